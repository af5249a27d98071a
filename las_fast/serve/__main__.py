"""python -m las_fast.serve: transcribe over HTTP, with OpenAI's API and a web page.

Clients of OpenAI's /v1/audio/transcriptions work unchanged; las_fast/serve/README.md lists the addresses. Several
recordings are decoded in one batch. Ctrl-C, SIGTERM or SIGHUP finishes the running requests, then stops; a second
signal stops at once.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from las_fast.arguments import (
    add_device_option,
    add_lm_option,
    add_search_options,
    add_vad_option,
    check_nbest,
    check_transcription_options,
    decoding_options,
)
from las_fast.cli import run
from las_fast.errors import InputError, print_error, show
from las_fast.files import DEFAULT_MODEL
from las_fast.options import Parser
from las_fast.output.transcripts import MIN_SPEECH_SCORE
from las_fast.serve.limits import BATCH_SECONDS, add_options, parse_limits
from las_fast.system import choose_device, return_freed_memory

if TYPE_CHECKING:  # importing torch and starlette would slow down --help
    from las_fast.recogniser import Recogniser
    from las_fast.serve.app import Service
    from las_fast.serve.batcher import Batcher
    from las_fast.serve.limits import Limits

NBEST = 3  # hypotheses per segment on the page


def parser() -> Parser:
    parser = Parser(
        prog="python -m las_fast.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", metavar="RUN|FILE|NAME", help=f"run folder, file or released model (default: {DEFAULT_MODEL})")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is reachable from other machines, without "
        "passwords or encryption (default: 127.0.0.1)")  # fmt: skip
    add("--port", type=int, default=8000, help="port to listen on; 0 chooses a free one (default: 8000)")
    add_options(parser)
    add_search_options(parser)
    add_lm_option(parser)
    add("--batch-seconds", type=float, default=BATCH_SECONDS, metavar="N",
        help="seconds of speech decoded together; 0: one segment at a time "
        f"(default: {BATCH_SECONDS:g})")  # fmt: skip
    add("--nbest", type=int, help=f"maximum hypotheses per segment on the page (default: {NBEST}, at most the beam)")
    add("--min-speech-score", type=float, default=MIN_SPEECH_SCORE, metavar="X",
        help=f"leave out segments with a lower speech score; -inf keeps all (default: {MIN_SPEECH_SCORE})")  # fmt: skip
    add_vad_option(parser)
    add("--language", default="english", help="language that verbose_json reports (default: english)")
    add_device_option(parser)
    add("--quiet", action="store_true", help="do not log a line per request to standard error")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    options = parser().parse_args(argv)
    limits = parse_limits(options)
    if not options.batch_seconds >= 0:
        raise InputError(f"--batch-seconds must be 0 or more; got {options.batch_seconds:g}")
    check_transcription_options(options)
    check_packages()
    with listen(options.host, options.port) as listener:  # before the model is loaded, which takes seconds
        return_freed_memory()
        model, name = open_model(options)
        from las_fast.serve.app import Service

        batcher = make_batcher(model, options, limits)
        start_log(quiet=options.quiet)
        serve(Service(model, name, batcher, limits, options.language), listener)


def make_batcher(model: Recogniser, options: argparse.Namespace, limits: Limits) -> Batcher:
    """Return the batcher of the options; raise InputError if they do not fit the model."""
    from las_fast.serve.batcher import Batcher

    search = decoding_options(options)
    beam = model.settings(**search).beam
    nbest = options.nbest or min(NBEST, beam)
    check_nbest(nbest, beam)
    return Batcher(
        model,
        max_seconds=limits.max_seconds,
        batch_seconds=options.batch_seconds,
        **search,
        nbest=nbest,
        min_speech_score=options.min_speech_score,
        vad=options.vad,
    )


def check_packages() -> None:
    """Raise InputError if a package of the extra `serve` is missing."""
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"serve needs the package {error.name}; run: pip install starlette uvicorn python-multipart "
            "prometheus-client"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address; raise InputError if that is impossible."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be from 0 to 65535; got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--host {show(host)} --port {port} cannot be used ({reason}); give another") from None


def open_model(options: argparse.Namespace) -> tuple[Recogniser, str]:
    """Load the model; return it and its name, which requests give in the field `model`."""
    from las_fast.checkpoint import default_model, load_model
    from las_fast.recogniser import Recogniser

    device = choose_device(options.device)
    loaded = load_model(default_model() if options.checkpoint is None else options.checkpoint, device)
    return Recogniser(loaded, device, lm_option="--lm "), show(loaded.name)


def start_log(*, quiet: bool) -> None:
    """Log to standard error: failures of the service and, unless `quiet`, a line per request."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S%z")
    logging.getLogger("las_fast.serve").setLevel(logging.WARNING if quiet else logging.INFO)


def serve(service: Service, listener: socket.socket) -> None:
    """Answer requests until a signal; then finish those that are running, or exit at a second signal."""
    import uvicorn

    from las_fast.serve.app import SEND_GRACE

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                print_error("interrupted")
                os._exit(128 + sig)  # sys.exit would wait for the thread of the model, or crash in it
            super().handle_exit(sig, frame)

    longest = math.ceil(service.limits.timeout + 2 * SEND_GRACE)  # a connection that nobody reads would stay for ever
    config = uvicorn.Config(service.application(), log_config=None, access_log=False, lifespan="on",
                            server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=longest)  # fmt: skip
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))  # which uvicorn handles
    announce(service.name, *listener.getsockname()[:2])
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
        Server(config).run(sockets=[listener])
    print("stopped", flush=True)


def announce(name: str, host: str, port: int) -> None:
    """Print the address, and a warning if other machines can reach it."""
    if not ipaddress.ip_address(host).is_loopback:
        print("warning: every machine that reaches this one can use the service without a password, and browsers "
              "allow the microphone only on localhost or over https", file=sys.stderr)  # fmt: skip
    print(f"{name} on http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C stops", flush=True)


if __name__ == "__main__":
    run(main)
