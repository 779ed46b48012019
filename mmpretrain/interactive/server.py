"""The server of the page: on this machine, without traffic to others."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from mmpretrain.interactive.abilities import Abilities

_MAX_UPLOAD_BYTES = 1 << 26


def check_installed() -> None:
    """Raises: ValueError if gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("gradio is not installed; pip install 'multimodal-pretrain[demo]'")


@contextmanager
def served(title: str, abilities: Abilities, host: str, port: int) -> Iterator[str]:
    """Serve the page inside the block, and give its address.

    Uploads and pictures lie in a temporary folder, which is removed at the end.

    Raises: ValueError if the port cannot be used.
    """
    _set_environment()
    with tempfile.TemporaryDirectory(prefix="mmpretrain-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        from mmpretrain.interactive import page  # now, since Gradio reads the environment on import

        blocks = page.build(title, abilities)
        try:
            _, address, _ = blocks.launch(
                server_name=host, server_port=port, share=False, inbrowser=False, inline=False, quiet=True,
                prevent_thread_lock=True, show_error=True, footer_links=[], run_history=False, ssr_mode=False,
                pwa=False, mcp_server=False, enable_monitoring=False, num_workers=0, max_file_size=_MAX_UPLOAD_BYTES,
                theme=page.theme(),
            )  # fmt: skip
        except OSError as error:
            raise ValueError(f"port {port} of {host} cannot be used; expected a free one: port=...") from error
        try:
            yield address
        finally:
            blocks.close(verbose=False)


def _set_environment() -> None:
    """Let Gradio send nothing about its use, and reach its own server without a proxy."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join([*([direct] if direct else []), "127.0.0.1", "localhost"])
