// Show the widgets of a page and exchange their state with its kernel, as JupyterLab does, for the few kinds that pages have.
// Protocols: v1.kernel.websocket.jupyter.org, ipywidgets' comms, anywidget's modules.
(() => {
const models = new Map(); // by id
let base = "", kernel = "", socket = null, control = "";
const session = crypto.randomUUID?.() ?? Math.random().toString(36).slice(2);
const LOOK_MS = 10000; // between two looks whether the kernel is there
const RETRY_MS = 1000; // before a lost connection is opened again

// A message of the protocol v1: the number of offsets and the offsets, 64 bits each, then the parts: channel, header, parent, metadata, content, buffers.
function packed(texts) {
  const parts = texts.map((text) => new TextEncoder().encode(text)), from = 8 * (parts.length + 2);
  const ends = parts.reduce((at, part) => [...at, at.at(-1) + part.length], [from]);
  const all = new Uint8Array(ends.at(-1)), view = new DataView(all.buffer);
  [ends.length, ...ends].forEach((value, k) => view.setUint32(8 * k, value, true)); // no message has more than four gigabytes
  parts.forEach((part, k) => all.set(part, ends[k]));
  return all;
}

function unpacked(data) {
  const view = new DataView(data), ends = Array.from({ length: view.getUint32(0, true) }, (_, k) => view.getUint32(8 * (k + 1), true));
  const parts = ends.slice(0, -1).map((from, k) => new DataView(data, from, ends[k + 1] - from));
  const read = (k) => JSON.parse(new TextDecoder().decode(parts[k]));
  return { header: read(1), content: read(4), buffers: parts.slice(5) };
}

function tell(type, content, metadata = {}) {
  if (socket?.readyState !== WebSocket.OPEN) return;
  const header = { msg_id: `${session}-${performance.now()}`, msg_type: type, session, username: "", version: "5.3", date: new Date().toISOString() };
  socket.send(packed(["shell", ...[header, {}, metadata, content].map((part) => JSON.stringify(part))]));
}

// The state of a widget, with the interface that anywidget gives to its modules.
class Model {
  constructor(id) { this.id = id; this.state = {}; this.mine = {}; this.heard = new Map(); }
  get(name) { return this.state[name]; }
  set(name, value) { this.state[name] = this.mine[name] = value; this.emit(`change:${name}`); }
  save_changes() { tell("comm_msg", { comm_id: this.id, data: { method: "update", state: this.mine, buffer_paths: [] } }); this.mine = {}; }
  send(content) { tell("comm_msg", { comm_id: this.id, data: { method: "custom", content } }); }
  on(name, listener) { this.heard.set(name, [...(this.heard.get(name) ?? []), listener]); }
  off(name, listener) { this.heard.set(name, (this.heard.get(name) ?? []).filter((one) => one !== listener)); }
  emit(name, ...values) { for (const listener of this.heard.get(name) ?? []) listener(...values); }
  update(state) {
    const changed = Object.keys(state).filter((name) => JSON.stringify(state[name]) !== JSON.stringify(this.state[name]));
    Object.assign(this.state, state);
    for (const name of changed) this.emit(`change:${name}`);
  }
}

const made = (tag, className, properties = {}) => Object.assign(document.createElement(tag), { className, ...properties });
const named = (reference) => models.get(reference.replace("IPY_MODEL_", ""));

function dropdown(model) {
  const el = made("div", "widget-dropdown"), list = made("select", "", { title: model.get("tooltip") ?? "" });
  const choose = () => { list.selectedIndex = model.get("index") ?? -1; };
  const fill = () => { list.replaceChildren(...model.get("_options_labels").map((text) => new Option(text))); choose(); };
  list.setAttribute("aria-label", list.title);
  list.onchange = () => { model.set("index", list.selectedIndex); model.save_changes(); };
  model.on("change:_options_labels", fill);
  model.on("change:index", choose);
  fill();
  el.append(list);
  return el;
}

function button(model) {
  const el = made("button", "widget-button", { type: "button", textContent: model.get("description"), title: model.get("tooltip") ?? "" });
  el.onclick = () => model.send({ event: "click" });
  return el;
}

function html(model) {
  const el = made("div", "widget-html"), fill = () => { el.innerHTML = model.get("value"); };
  model.on("change:value", fill);
  fill();
  return el;
}

// Children that stay are not drawn again.
function box(model) {
  const el = made("div", model.get("_model_name") === "VBoxModel" ? "widget-box widget-vbox" : "widget-box"), views = new Map();
  const fill = () => {
    const wanted = model.get("children").map(named).filter(Boolean);
    for (const [child, view] of views) if (!wanted.includes(child)) { end(view); views.delete(child); }
    wanted.forEach((child, k) => {
      if (!views.has(child)) views.set(child, view(child));
      if (el.children[k] !== views.get(child)) el.insertBefore(views.get(child), el.children[k] ?? null);
    });
  };
  model.on("change:children", fill);
  fill();
  return el;
}

const modules = new Map(); // by their text
const load = (text) => {
  if (!modules.has(text)) modules.set(text, import(URL.createObjectURL(new Blob([text], { type: "text/javascript" }))));
  return modules.get(text);
};

function drawn(model) {
  const el = made("div", "");
  load(model.get("_esm")).then(({ default: { render } }) => render({ model, el })).then((ended) => { el.ended = ended; });
  return el;
}

const KINDS = { DropdownModel: dropdown, ButtonModel: button, HTMLModel: html, BoxModel: box, VBoxModel: box, AnyModel: drawn };

function view(model) {
  const el = KINDS[model.get("_model_name")](model);
  for (const [name, value] of Object.entries(named(model.get("layout")).state)) if (!name.startsWith("_") && value !== null) el.style.setProperty(name.replaceAll("_", "-"), value);
  return el;
}

function end(el) {
  for (const one of [...el.querySelectorAll("*"), el]) one.ended?.();
  el.remove();
}

// Fill the places of the document whose widgets are known by now.
function place() {
  for (const el of document.querySelectorAll("[data-model]:empty")) if (models.has(el.dataset.model)) el.append(view(models.get(el.dataset.model)));
}

function take(id, state) {
  const known = models.get(id) ?? new Model(id);
  models.set(id, known);
  known.update(state);
}

function receive({ header, content, buffers }) {
  const { comm_id: id, data } = content, type = header.msg_type;
  if (type === "status" && ["restarting", "autorestarting", "dead"].includes(content.execution_state)) lost();
  else if (type === "comm_open") { take(id, data.state); place(); }
  else if (type === "comm_close" && id === control) setTimeout(ask, RETRY_MS / 4); // the kernel has not imported ipywidgets yet
  else if (type === "comm_close") models.delete(id);
  else if (type === "comm_msg" && id === control) {
    for (const [one, { state }] of Object.entries(data.states)) take(one, state);
    place();
  } else if (type === "comm_msg" && data.method === "update") models.get(id)?.update(data.state);
  else if (type === "comm_msg" && data.method === "custom") models.get(id)?.emit("msg:custom", data.content, buffers);
}

function connect() {
  socket = new WebSocket(`${location.origin.replace("http", "ws")}${base}api/kernels/${kernel}/channels?session_id=${session}`, "v1.kernel.websocket.jupyter.org");
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => receive(unpacked(data));
  socket.onclose = () => setTimeout(async () => { if (await alive()) connect(); }, RETRY_MS);
  socket.onopen = ask;
}

function ask() { // for the state of all widgets
  control = `${session}-${performance.now()}`;
  tell("comm_open", { comm_id: control, target_name: "jupyter.widget.control", data: {} }, { version: "1.0.0" });
  tell("comm_msg", { comm_id: control, data: { method: "request_states" } });
}

async function alive() {
  const answer = await fetch(`${base}api/kernels/${kernel}`).catch(() => null);
  if (!answer?.ok) lost();
  return answer?.ok;
}

function lost() {
  if (document.querySelector(".cr-lost")) return;
  clearInterval(looking);
  const text = 'The process behind this page has ended, so it no longer changes. <a href="">Load it again</a>';
  document.querySelector(".cr-nav").after(made("p", "cr-lost", { innerHTML: text }));
}

window.voila_heartbeat = () => {}; // Voila calls it while it waits for a cell
let looking = 0;
window.openPage = () => { // as soon as the document names the kernel
  ({ baseUrl: base, kernelId: kernel } = JSON.parse(document.getElementById("jupyter-config-data").textContent));
  connect();
  looking = setInterval(alive, LOOK_MS);
  document.addEventListener("DOMContentLoaded", place);
  addEventListener("pagehide", () => navigator.sendBeacon(`${base}voila/api/shutdown/${kernel}`));
  addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
};

// light or dark
const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
const kept = () => localStorage.getItem("cr-theme") ?? (dark.matches ? "dark" : "light");
const apply = () => { root.dataset.theme = kept(); dispatchEvent(new Event("cr-theme")); };
apply();
dark.addEventListener("change", apply);
window.crTheme = () => { localStorage.setItem("cr-theme", kept() === "dark" ? "light" : "dark"); apply(); };
})();
