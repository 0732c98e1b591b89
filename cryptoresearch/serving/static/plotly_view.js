// Draw a plotly figure, in the colours of the page; figure_theme.js comes first.
function ready(model) {
  if (!window.Plotly) {
    const tag = document.createElement("script");
    tag.textContent = model.get("script");
    document.head.append(tag);
  }
}

function render({ model, el }) {
  ready(model);
  const box = document.createElement("div");
  el.append(box);
  const draw = () => {
    const { data, layout } = JSON.parse(model.get("figure"));
    window.Plotly.react(box, inked(data), themed(layout), JSON.parse(model.get("config")));
  };
  const watch = new ResizeObserver(() => box.clientWidth > 0 && window.Plotly.Plots.resize(box));
  draw();
  model.on("change:figure", draw);
  window.addEventListener("cr-theme", draw);
  watch.observe(el);
  return () => { watch.disconnect(); window.removeEventListener("cr-theme", draw); model.off("change:figure", draw); window.Plotly.purge(box); };
}
export default { render };
