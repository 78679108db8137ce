"""Alternative texts for the pictures that Gradio shows without one: uploads, both sides of a slider, examples."""

from __future__ import annotations

HEAD = """<script>
// A picture in a conversation was sent; an example's is told by the rest of its row or button; any other by the label
// of its block.
const describe = (image) => {
  if (image.alt.trim()) return;
  const example = image.closest("tr, button")?.innerText.trim();
  const label = image.closest(".block")?.querySelector("[data-testid=block-label]")?.innerText.trim();
  if (image.closest("[role=log]")) image.alt = "Picture that was sent";
  else image.alt = example ? "Example: " + example : label || "Picture";
};
new MutationObserver(() => document.querySelectorAll("img").forEach(describe)).observe(document, {
  childList: true, subtree: true, attributes: true, attributeFilter: ["src"],
});
</script>"""
