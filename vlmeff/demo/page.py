"""The page: a headline, the model, and the tabs."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like

from vlmeff.demo import alternative_text, look
from vlmeff.demo.limits import MIB
from vlmeff.demo.site import Site, shown
from vlmeff.demo.tabs import about_tab, chat_tab, compare_tab, generate_tab, sweep_tab, video_tab

HEAD = (
    '<div class="vl-head"><h1>vlmeff</h1><p>The same model, cheaper to run: its answer as it is, and its answer with a '
    "preset, with what each one cost.</p></div>"
)


def build_demo(site: Site) -> gr.Blocks:
    """Assemble the page for an engine and its limits; ``serve_demo`` serves it."""
    with gr.Blocks(title="vlmeff", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        with gr.Row(elem_id="head"):
            gr.HTML(HEAD, scale=1, min_width=260)
            model = gr.Dropdown(
                site.models, value=site.models[0], label="Model", elem_id="model", scale=0, min_width=240,
                interactive=len(site.models) > 1,
            )  # fmt: skip
        with gr.Tabs():
            with gr.Tab("Compare"):
                compared = compare_tab.build(site, model)
            with gr.Tab("Chat"):
                chatted = chat_tab.build(site, model)
            with gr.Tab("Sweep"):
                sweep_tab.build(site, model)
            with gr.Tab("Video"):
                filmed = video_tab.build(site, model)
            with gr.Tab("Generate"):
                generate_tab.build(site)
            with gr.Tab("About"):
                about_tab.build(site, model)

        @shown
        def use(name: str) -> list[Any]:
            return [gr.Dropdown(choices=site.presets(name), value=site.favourite(name))] * 3

        model.change(
            use, [model], [compared, chatted, filmed], api_name="model", concurrency_limit=None, show_progress="hidden"
        )
    demo.queue(max_size=16, default_concurrency_limit=1)
    for block in demo.blocks.values():
        _take_no_addresses(block)
    return demo


def _take_no_addresses(block: Any) -> None:
    """Where a request names a file by its address, Gradio would fetch it, from wherever it lies."""
    move = block.async_move_resource_to_block_cache

    async def moved(place: Any) -> Any:
        if is_http_url_like(str(place)):
            raise gr.Error("Only files that were uploaded here are read.", print_exception=False)
        return await move(place)

    block.async_move_resource_to_block_cache = moved


def launch_options(site: Site) -> dict[str, Any]:
    """What ``Blocks.launch`` is given besides the address: looks and limits."""
    return {
        "theme": look.theme(),
        "css": look.CSS,
        "head": alternative_text.HEAD,
        "share": False,
        "max_file_size": round(site.limits.max_file_mb * MIB),  # as text it takes whole numbers only
        "allowed_paths": [],
        "enable_monitoring": False,  # left out, Gradio shows every visitor its statistics
        "mcp_server": False,
        "show_error": False,
        "footer_links": ["api"],
    }
