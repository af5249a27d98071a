"""Explain why a file cannot be opened as audio, and what to do."""

from __future__ import annotations

from las_fast.data.containers import OGG_CODECS, Source, Stream, foreign_format
from las_fast.data.decoder import decoder_message
from las_fast.data.media import DEMUXERS, INSTALL, has_pyav

NOT_AUDIO = (  # lower-case first bytes
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<!doctype html", "a web page, perhaps an error page of a download; download it again"),
    (b"id3", "an ID3 tag without any known audio after it; copy it again"),
    (b"<html", "a web page, perhaps an error page of a download; download it again"),
    (b"pk\x03\x04", "a zip archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"rar!", "a rar archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
)


def refusal_reason(source: Source, stream: Stream, error: Exception) -> str:
    """Return why a stream could not be opened and what to do, as a clause such as "is a zip archive; unpack it"."""
    if source.error:
        return f"cannot be read ({source.error.strerror})"
    head = source.read(0, 64)
    ogg = any(magic in source.read(0, 8192) for magic in OGG_CODECS)
    if not ogg and (name := foreign_format(source)):
        convert = "convert it: ffmpeg -i FILE -vn -ac 1 -ar 16000 FILE.wav"
        if name not in DEMUXERS:
            return f"is {name}, which cannot be read; {convert}"
        if has_pyav():
            return f"is {name}, which cannot be decoded ({decoder_message(error)}); copy it again or {convert}"
        return f"is {name}, which needs PyAV; run: {INSTALL}, or {convert}"
    for magic, name in NOT_AUDIO:
        if head.lower().startswith(magic):
            return f"is {name}"
    if stream.truncated_header or stream.cut:
        return "is cut off or damaged within its header, before any sound; copy it again"
    if not any(head):
        return "begins with zeros only, as after a crash or an interrupted copy; copy it again"
    if ogg and head[:4] == b"OggS":
        return f"cannot be read as audio ({decoder_message(error)}): its first pages are damaged; copy it again"
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff", b"fLaC", b"NIST"):
        return (
            f"cannot be read as audio ({decoder_message(error)}): its header is damaged, or its codec is unknown; "
            "convert it: ffmpeg -i FILE -ac 1 -ar 16000 FILE.wav"
        )
    return f"cannot be read as audio ({decoder_message(error)}); give a wav, flac, ogg or mp3 file"
