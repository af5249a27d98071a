"""Recognise formats by their first bytes: supported ones, and unsupported ones that errors name."""

from __future__ import annotations

from las_fast.data.containers.mpeg import frame_header
from las_fast.data.containers.streams import Source
from las_fast.data.containers.tags import skip_tags

# An archive may contain an uncompressed mp3, which must not be taken for the recording.
ARCHIVES = (b"PK\x03\x04", b"Rar!", b"7z\xbc\xaf")
MAGIC = {b"OggS": "ogg", b"fLaC": "flac", b".snd": "au", b"caff": "caf", b"riff": "w64"}
RARE = {  # formats whose length is computed in rare.py
    b"NIST_1A": "nist",
    b"2BIT": "avr",
    b"\x01\x04": "mpc",
    b"ALawSoundFile**": "wve",
    b"\xf0\x7e": "sds",
    b"Creative Voice": "voc",
    b"\0\0\0\0\1\0\0\0\1\0\0\0": "mat4",
    b"\0\0\x03\xe8\0\0\0\1\0\0\0\1": "mat4",
    b"MATLAB 5.0 MAT": "mat5",
}
FOREIGN = (  # (position, magic number, name)
    (4, b"ftyp", "MPEG-4 (m4a, mp4, mov)"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska (webm, mkv)"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media (wma, asf)"),
    (0, b"#!AMR", "AMR"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"\x0b\x77", "AC-3"),
    (8, b"AVI ", "AVI"),
    (0, b"FLV\x01", "Flash video"),
    (0, b"wvpk", "WavPack"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"TTA1", "True Audio"),
    (0, b"MPCK", "Musepack"),
    (0, b"MP+", "Musepack"),
    (0, b".RMF", "RealMedia"),
    (0, b"DSD ", "DSD"),
    (0, b"\x00\x00\x01\xba", "MPEG video"),
    (0, b"\x00\x00\x01\xb3", "MPEG video"),
)


def container_at(source: Source, position: int) -> str | None:
    """Return the format of the container that begins at a position, or None if there is none."""
    head = source.read(position, 16)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC", b"8SVX", b"16SV"):
        return "aiff"
    if head[:4] in MAGIC:
        return MAGIC[head[:4]]
    for magic, name in RARE.items():
        if head.startswith(magic):
            return name
    return "mpeg" if frame_header(head[:4]) else None


def foreign_format(source: Source) -> str:
    """Return the name of a known but unsupported format of audio or video, or ""."""
    head = source.read(skip_tags(source, 0), 377)
    for position, magic, name in FOREIGN:
        if head[position:].startswith(magic):
            return name
    if len(head) == 377 and head[0] == head[188] == head[376] == 0x47:
        return "an MPEG transport stream"
    return "Ogg without Vorbis, Opus or FLAC" if head.startswith(b"OggS") else ""
