// Draw a plotly figure, in the colours of the page.
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--cr-${name}`).trim();

function ready(model) {
  if (!window.Plotly) {
    const tag = document.createElement("script");
    tag.textContent = model.get("script");
    document.head.append(tag);
  }
}

function themed(layout) {
  const template = layout.template?.layout ?? {}, axis = { gridcolor: color("grid"), linecolor: color("grid") };
  Object.assign(template, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" });
  template.font = { ...template.font, color: color("text") };
  template.hoverlabel = { ...template.hoverlabel, bgcolor: color("paper"), font: { ...template.hoverlabel?.font, color: color("text") } };
  for (const name of ["xaxis", "yaxis"]) template[name] = { ...template[name], ...axis };
  for (const name of Object.keys(layout).filter((k) => /^[xy]axis\d*$/.test(k))) Object.assign(layout[name], axis);
  for (const note of layout.annotations ?? []) {
    note.font = { ...note.font, color: color("muted") };
    if (note.bgcolor) note.bgcolor = "rgba(0,0,0,0)";
  }
  if (layout.title?.subtitle?.font) layout.title.subtitle.font.color = color("muted");
  layout.template = { ...layout.template, layout: template };
  return layout;
}

function render({ model, el }) {
  ready(model);
  const box = document.createElement("div");
  el.append(box);
  const draw = () => {
    const { data, layout } = JSON.parse(model.get("figure"));
    window.Plotly.react(box, data, themed(layout), JSON.parse(model.get("config")));
  };
  const watch = new ResizeObserver(() => box.clientWidth > 0 && window.Plotly.Plots.resize(box));
  draw();
  model.on("change:figure", draw);
  window.addEventListener("cr-theme", draw);
  watch.observe(el);
  return () => { watch.disconnect(); window.removeEventListener("cr-theme", draw); model.off("change:figure", draw); window.Plotly.purge(box); };
}
export default { render };
