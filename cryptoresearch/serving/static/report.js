// Draw the figures of a report where they are visible, in the colours of the page; figure_theme.js comes first.
const page = JSON.parse(document.getElementById("figures").textContent), drawn = new Set();
const sections = [...document.querySelectorAll("details")], button = document.getElementById("open-all");

function whole(part) {
  if (Array.isArray(part)) return part.map(whole);
  if (part === null || typeof part !== "object") return part;
  if ("$" in part) return structuredClone(page.shared[part.$]);
  return Object.fromEntries(Object.entries(part).map(([name, value]) => [name, whole(value)]));
}

function draw(box) {
  const { data, layout } = whole(page.figures[box.id]);
  window.Plotly.react(box, inked(data), themed(layout), page.config);
  drawn.add(box);
}

function show() {
  for (const box of document.querySelectorAll(".figure")) if (!drawn.has(box) && !box.closest("details:not([open])")) draw(box);
}

function openAll(open) {
  for (const section of sections) section.open = open;
  show();
}

function follow() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1))), section = named?.closest("details");
  if (!section) return;
  section.open = true;
  named.scrollIntoView();
}

for (const section of sections) section.addEventListener("toggle", () => {
  show();
  if (button) button.textContent = sections.every((s) => s.open) ? "Close all sections" : "Open all sections";
});
button?.addEventListener("click", () => openAll(!sections.every((s) => s.open)));
window.addEventListener("beforeprint", () => openAll(true));
window.addEventListener("hashchange", follow);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
show();
follow();
