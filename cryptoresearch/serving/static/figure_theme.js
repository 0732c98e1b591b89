// Colour a plotly figure as the page around it; style sheets define --cr-paper, --cr-text, --cr-muted and --cr-grid.
const SWAPPED = { "#20242a": "text", "#1f5fbf": "link", "#4B5563": "muted" }; // INK and MODEL of serving.report_figures, outcome of serving.figures: too dark for a dark page
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--cr-${name}`).trim();

function themed(layout) {
  const template = layout.template?.layout ?? {}, axis = { gridcolor: color("grid"), linecolor: color("grid"), zerolinecolor: color("grid") };
  Object.assign(template, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" });
  template.font = { ...template.font, color: color("text") };
  template.hoverlabel = { ...template.hoverlabel, bgcolor: color("paper"), font: { ...template.hoverlabel?.font, color: color("text") } };
  for (const name of ["xaxis", "yaxis"]) template[name] = { ...template[name], ...axis };
  for (const name of Object.keys(layout).filter((k) => /^[xy]axis\d*$/.test(k))) Object.assign(layout[name], axis);
  for (const note of layout.annotations ?? []) {
    note.font = { ...note.font, color: color("muted") };
    if (note.bgcolor) note.bgcolor = "rgba(0,0,0,0)";
  }
  if (layout.title?.text) layout.title.text = layout.title.text.replaceAll("#B42318", color("warning")); // that of serving.figures
  for (const font of [layout.font, layout.title?.font]) if (font && font.color in SWAPPED) font.color = color(SWAPPED[font.color]);
  if (layout.title?.subtitle?.font) layout.title.subtitle.font.color = color("muted");
  layout.template = { ...layout.template, layout: template };
  return layout;
}

function inked(data) {
  for (const trace of data) for (const part of [trace.line, trace.marker]) if (part && part.color in SWAPPED) part.color = color(SWAPPED[part.color]);
  return data;
}
