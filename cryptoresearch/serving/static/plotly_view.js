// Draw a plotly figure, in the colours of the page; figure_theme.js and library.js come first.

// Break a title, which may have tags, into lines of some width in pixels.
function folded(text, width, size) {
  const most = Math.max(20, Math.floor(width / (0.55 * size)));
  let out = "", length = 0;
  for (const [part] of text.matchAll(/<[^>]*>|\s*[^<\s]+|\s+/g)) {
    const word = part.startsWith("<") ? "" : part, next = length > 0 && length + word.length > most;
    out += next ? `<br>${part.trimStart()}` : part;
    length = /^<br/.test(part) ? 0 : next ? word.trimStart().length : length + word.length;
  }
  return out;
}

// Fold title and subtitle to the width of a page; the figure grows by their lines, the plot keeps its height.
function fitted(layout, width) {
  const usual = layout.template?.layout ?? {}, margin = { ...usual.margin, ...layout.margin };
  let more = 0;
  for (const [title, own] of [[layout.title, usual.title?.font?.size], [layout.title?.subtitle, 12]]) {
    if (!title?.text) continue;
    const size = title.font?.size ?? own ?? 17, text = folded(title.text, width - 72, size);
    const lines = 1.3 * size * (text.split("<br>").length - title.text.split("<br>").length);
    title.text = text;
    more += lines;
    if (title === layout.title) title.pad = { ...usual.title?.pad, ...title.pad, t: (title.pad?.t ?? usual.title?.pad?.t ?? 0) + lines }; // plotly puts the last line where one alone is
  }
  if (more > 0) Object.assign(layout, { margin: { ...margin, t: (margin.t ?? 100) + more }, height: (layout.height ?? 450) + more });
  return layout;
}

async function render({ model, el }) {
  await library(model, "Plotly");
  const box = document.createElement("div");
  el.append(box);
  let drawn = 0; // width
  const draw = () => {
    if (!model.get("figure") || box.clientWidth === 0) return; // nothing to show yet, or no place
    const { data, layout } = JSON.parse(model.get("figure"));
    drawn = box.clientWidth;
    window.Plotly.react(box, inked(data), fitted(themed(layout), drawn), JSON.parse(model.get("config")));
  };
  const watch = new ResizeObserver(() => box.clientWidth !== drawn && draw());
  draw();
  model.on("change:figure", draw);
  window.addEventListener("cr-theme", draw);
  watch.observe(el);
  return () => { watch.disconnect(); window.removeEventListener("cr-theme", draw); model.off("change:figure", draw); window.Plotly.purge(box); };
}
export default { render };
