"""Server of the local pages of `genomamba app` and `audiomamba app`.

Pages are built with Gradio. They are served on this machine only unless the user chooses another address, and make no
requests to other hosts.
"""

from __future__ import annotations

import atexit
import functools
import html
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from mambacore.errors import InputError
from mambacore.files import temporary_folder
from mambacore.safe_text import safe_for_terminal
from mambapipelines.apps.origin import SameOriginOnly, is_loopback
from mambapipelines.console import note

# Requests computed at once; others are queued.
SIMULTANEOUS_RUNS = 1


def load_gradio() -> ModuleType:
    """Import Gradio; uploads go to a temporary folder of this process.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("GRADIO_TEMP_DIR", str(_upload_folder()))
    try:
        import gradio  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InputError(
            f"the page needs Gradio, which cannot be imported ({error}): pip install 'genomamba[app]'"
        ) from None
    return gradio


@functools.cache
def _upload_folder() -> Path:
    """Removed when the process ends: what strangers upload does not stay."""
    opened = ExitStack()
    atexit.register(opened.close)
    return opened.enter_context(temporary_folder())


def paragraph(sentence: str, mistake: bool = False) -> str:
    """A sentence as HTML; a mistake is highlighted, and announced by screen readers."""
    text = html.escape(safe_for_terminal(" ".join(sentence.split())))
    return f'<p role="alert" style="color: #b3261e"><b>{text}</b></p>' if mistake else f"<p>{text}</p>"


def player(address: str) -> str:
    """A player, as HTML, that begins to play what is at an address."""
    return f'<audio controls autoplay src="{html.escape(address)}"></audio>'


def serve(
    page: Any, host: str, port: int, largest_upload_megabytes: float, wait: bool = True, routes: Sequence[Any] = ()
) -> str:
    """Serve a page until Ctrl-C.

    Args:
        page: a `gradio.Blocks`.
        host: address to listen on.
        port: to listen on; 0 for any free one.
        largest_upload_megabytes: limit for uploads.
        wait: return only when interrupted; else the page is served by a thread while the caller continues.
        routes: further addresses, each a `starlette.routing.Route`.

    Returns:
        The address of the page.

    Raises:
        InputError: the address cannot be listened on.
    """
    gradio = load_gradio()
    from starlette.middleware import Middleware  # noqa: PLC0415 - comes with Gradio

    if not is_loopback(host):
        note(f"anyone who can reach {host} can use this page: it has no password")
    # System fonts: Gradio's own would be fetched from another host.
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.queue(default_concurrency_limit=SIMULTANEOUS_RUNS)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            max_file_size=int(largest_upload_megabytes * 1e6),
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(SameOriginOnly, host=host)], "routes": list(routes)},
            theme=theme,
        )
    except (OSError, ValueError) as error:
        sentence = " ".join(str(error).split())
        raise InputError(f"the page cannot be served on {host}:{port} ({sentence}): choose another --port.") from None
    note(f"the page is at {address} until Ctrl-C")
    if wait:
        page.block_thread()
    return str(address)
