// Draw a plotly figure, in the colours of the page; figure_theme.js and library.js come first.
async function render({ model, el }) {
  await library(model, "Plotly");
  const box = document.createElement("div");
  el.append(box);
  const draw = () => {
    if (!model.get("figure")) return; // nothing to show yet
    const { data, layout } = JSON.parse(model.get("figure"));
    window.Plotly.react(box, inked(data), themed(layout), JSON.parse(model.get("config")));
  };
  const watch = new ResizeObserver(() => box.clientWidth > 0 && box.data && window.Plotly.Plots.resize(box));
  draw();
  model.on("change:figure", draw);
  window.addEventListener("cr-theme", draw);
  watch.observe(el);
  return () => { watch.disconnect(); window.removeEventListener("cr-theme", draw); model.off("change:figure", draw); window.Plotly.purge(box); };
}
export default { render };
