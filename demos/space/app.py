"""The vlmeff demo as a Hugging Face Space: the page of ``vlmeff demo``, at the address that Spaces expect."""

from __future__ import annotations

import os
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: it reads this once

from vlmeff.demo.serving import serve_demo


def main(*, port: int = 7860, block: bool = True) -> Any:
    """Serve the models that ship with the package. ``block=False`` returns the running page."""
    return serve_demo(host="0.0.0.0", port=port, block=block)


if __name__ == "__main__":
    main()
