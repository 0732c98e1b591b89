// Candles, volume, order flow and indicators. The kernel sends bars at the resolution of the visible range.
const ROW = 8; // time (s), open, high, low, close, volume, order flow, share of the time that is missing
const DAY = 86400;
const SPANS = [["1D", DAY], ["1W", 7 * DAY], ["1M", 30 * DAY], ["3M", 91 * DAY], ["1Y", 365 * DAY], ["All", Infinity]];
const SETTLE_MS = 60; // after the last movement, before bars are asked for
const LOOK_MS = 5000; // between two looks for new bars

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--cr-${name}`).trim();
const alpha = (hex, share) => hex + Math.round(share * 255).toString(16).padStart(2, "0");
const number = (x) => (Number.isFinite(x) ? Number(x.toPrecision(8)).toLocaleString("en", { maximumSignificantDigits: 8 }) : "–");
const time = (s) => new Date(s * 1000).toISOString().slice(0, 19).replace("T", " ");

// Shade the times without trades, behind the candles.
class Gaps {
  constructor() { this.spans = []; }
  attached({ chart, requestUpdate }) { this.chart = chart; this.update = requestUpdate; }
  show(spans) { this.spans = spans; this.update?.(); }
  paneViews() {
    const draw = (target) => target.useBitmapCoordinateSpace(({ context, bitmapSize, horizontalPixelRatio: ratio }) => {
      const scale = this.chart.timeScale();
      context.fillStyle = color("gap");
      for (const [from, to] of this.spans) {
        const a = scale.logicalToCoordinate(from - 0.5), b = scale.logicalToCoordinate(to + 0.5);
        if (a !== null && b !== null) context.fillRect(a * ratio, 0, Math.max((b - a) * ratio, 1), bitmapSize.height);
      }
    });
    return [{ zOrder: () => "bottom", renderer: () => ({ draw }) }];
  }
}

function element(parent, tag, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  parent.append(made);
  return made;
}

function look() {
  const line = { color: color("grid") };
  return {
    layout: { background: { color: "transparent" }, textColor: color("muted"), fontFamily: "inherit", fontSize: 12, panes: { separatorColor: color("grid") } },
    grid: { vertLines: line, horzLines: line },
    rightPriceScale: { borderColor: color("grid") },
    timeScale: { borderColor: color("grid"), timeVisible: true, secondsVisible: true, rightOffset: 4, minBarSpacing: 0.3 },
    localization: { timeFormatter: (s) => `${time(s)} UTC` },
  };
}

async function render({ model, el }) {
  await library(model, "LightweightCharts");
  const { createChart, CandlestickSeries, HistogramSeries, LineSeries } = window.LightweightCharts;
  el.classList.add("cr-chart");
  const bar = element(el, "div", { className: "cr-chart-bar" });
  const legend = element(el, "div", { className: "cr-chart-legend" });
  legend.setAttribute("aria-live", "off");
  const box = element(el, "div", { className: "cr-chart-box", tabIndex: 0 });
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", "Candles. Arrow keys move, plus and minus zoom, Home and End go to the first and last bar.");
  const chart = createChart(box, { autoSize: true, ...look() });
  const candles = chart.addSeries(CandlestickSeries, { priceLineVisible: false, wickVisible: true });
  const volume = chart.addSeries(HistogramSeries, { priceFormat: { type: "volume" }, priceLineVisible: false, lastValueVisible: false }, 1);
  const gaps = new Gaps();
  candles.attachPrimitive(gaps);
  let flow = null, lines = [], now = null, asked = 0, answers = 0, timer = 0, quiet = false, wanted = null;

  const paint = () => {
    const [up, down] = [color("up"), color("down")];
    chart.applyOptions(look());
    candles.applyOptions({ upColor: up, downColor: down, borderVisible: false, wickUpColor: up, wickDownColor: down });
    if (now) fill();
  };

  // the range that is visible, in seconds; it may reach beyond the bars that are here
  const visible = () => {
    const range = chart.timeScale().getVisibleLogicalRange();
    return range && now ? [now.first + range.from * now.length, now.first + range.to * now.length] : null;
  };
  const show = ([from, to]) => chart.timeScale().setVisibleLogicalRange({ from: (from - now.first) / now.length, to: (to - now.first) / now.length });

  const width = () => Math.max(Math.round(box.clientWidth), 300);
  const ask = (from, to) => model.send({ type: "range", id: ++asked, from, to, width: width() });

  // bars are asked for when the view leaves those that are here, or when another resolution would suit it
  const moved = () => {
    const range = visible();
    if (!range || quiet || wanted) return;
    model.set("view", range.map((s) => Math.round(s)));
    model.save_changes();
    const [from, to] = range, here = [now.first, now.first + (now.rows + 1) * now.length];
    const missing = (from < here[0] && here[0] > now.start) || (to > here[1] && here[1] < now.end);
    const most = width(), suits = now.lengths.find((s) => (3 * (to - from)) / s <= most) ?? now.lengths.at(-1);
    if (missing || suits !== now.length) ask(from, to);
  };

  function fill() {
    const { data, rows } = now, [up, down] = [color("up"), color("down")];
    const price = [], traded = [], pressure = [], spans = [];
    for (let i = 0; i < rows; i++) {
      const [t, open, high, low, close, amount, net, missing] = data.subarray(i * ROW, i * ROW + ROW);
      const known = !Number.isNaN(close);
      price.push(known ? { time: t, open, high, low, close } : { time: t });
      traded.push(known ? { time: t, value: amount, color: alpha(close >= open ? up : down, 0.55) } : { time: t });
      pressure.push(Number.isNaN(net) ? { time: t } : { time: t, value: net, color: alpha(net >= 0 ? up : down, 0.7) });
      if (missing > 0) {
        const last = spans.at(-1);
        if (last && last[1] === i - 1) last[1] = i; else spans.push([i, i]);
      }
    }
    const last = price.findLast((p) => p.close)?.close, precision = last ? Math.min(Math.max(6 - Math.ceil(Math.log10(last)), 2), 10) : 2;
    candles.applyOptions({ priceFormat: { type: "price", precision, minMove: 10 ** -precision } });
    candles.setData(price);
    volume.setData(traded);
    gaps.show(spans);
    shape(now.indicators.length, now.flow);
    flow?.setData(pressure);
    now.indicators.forEach(({ values }, k) => lines[k].setData(price.map((p, i) => (Number.isNaN(values[i]) ? { time: p.time } : { time: p.time, value: values[i] }))));
    label(null);
  }

  // one pane for each indicator, and one for the order flow where the sides of trades are known
  function shape(count, hasFlow) {
    if (hasFlow !== (flow !== null) || count !== lines.length) {
      lines.forEach((line) => chart.removeSeries(line));
      if (flow) chart.removeSeries(flow);
      let pane = 2;
      flow = hasFlow ? chart.addSeries(HistogramSeries, { priceFormat: { type: "volume" }, priceLineVisible: false, lastValueVisible: false }, pane++) : null;
      lines = Array.from({ length: count }, () => chart.addSeries(LineSeries, { lineWidth: 1.5, priceLineVisible: false, lastValueVisible: false }, pane++));
      chart.panes().forEach((p, k) => p.setStretchFactor(k === 0 ? 4 : 1));
    }
    lines.forEach((line, k) => line.applyOptions({ color: color(k ? "second" : "first") }));
  }

  function label(index) {
    const i = index ?? now.rows - 1, at = i * ROW;
    if (!(i >= 0 && i < now.rows)) return;
    const [t, open, high, low, close, amount, net, missing] = now.data.subarray(at, at + ROW);
    const parts = [`${time(t)} UTC`, now.drawn];
    if (Number.isNaN(close)) parts.push("gap: trades are missing");
    else {
      parts.push(`O ${number(open)}`, `H ${number(high)}`, `L ${number(low)}`, `C ${number(close)}`, `volume ${number(amount)}`);
      if (!Number.isNaN(net)) parts.push(`bought − sold ${number(net)}`);
      if (missing > 0) parts.push(`${(100 * missing).toFixed(missing < 0.1 ? 1 : 0)} % missing`);
    }
    now.indicators.forEach(({ name, values }) => parts.push(`${name} ${number(values[i])}`));
    if (now.note) parts.push(now.note);
    legend.textContent = parts.join("  ·  ");
  }

  const receive = (message, buffers) => {
    if (message.type !== "bars" || (message.id && message.id < asked)) return; // 0: sent unasked; an older answer is of no use
    const kept = wanted || message.show || visible();
    if (message.id === asked) wanted = null;
    const data = new Float64Array(buffers[0].buffer.slice(buffers[0].byteOffset, buffers[0].byteOffset + buffers[0].byteLength));
    const rows = data.length / (ROW + message.names.length), plain = data.subarray(0, rows * ROW);
    const indicators = message.names.map((name, k) => ({ name, values: data.subarray(rows * ROW + k * rows, rows * ROW + (k + 1) * rows) }));
    now = { ...message, data: plain, rows, indicators, first: rows ? plain[0] : message.from };
    quiet = true;
    fill();
    if (kept) show(kept);
    quiet = false;
    el.dataset.length = message.length;
    el.dataset.answers = ++answers;
  };

  const span = (seconds) => {
    if (!now) return;
    const to = visible() ? Math.min(visible()[1], now.end) : now.end;
    const from = seconds === Infinity ? now.start : to - seconds;
    jump(from, seconds === Infinity ? now.end : to);
  };
  const jump = (from, to) => { ask(from, to); wanted = [from, to]; }; // the chart does not scroll beyond its bars, so they come first

  for (const [text, seconds] of SPANS) element(bar, "button", { type: "button", textContent: text, onclick: () => span(seconds) });
  const date = element(bar, "input", { type: "date", title: "Go to a day (UTC)" });
  date.setAttribute("aria-label", "Go to a day (UTC)");
  date.onchange = () => {
    const at = Date.parse(`${date.value}T00:00:00Z`) / 1000, range = visible();
    if (range && Number.isFinite(at)) jump(at, at + Math.min(range[1] - range[0], 90 * DAY));
  };
  element(bar, "span", { className: "cr-hint", textContent: "wheel or pinch: zoom · drag: move · arrow keys, + and −" });

  box.onkeydown = (event) => {
    const range = visible();
    if (!range) return;
    const [from, to] = range, width = to - from;
    const step = { ArrowLeft: [-0.2, -0.2], ArrowRight: [0.2, 0.2], "+": [0.15, -0.15], "=": [0.15, -0.15], "-": [-0.2, 0.2] }[event.key];
    if (step) show([from + step[0] * width, to + step[1] * width]);
    else if (event.key === "Home") jump(now.start, now.start + width);
    else if (event.key === "End") jump(now.end - width, now.end);
    else return;
    event.preventDefault();
  };

  chart.timeScale().subscribeVisibleLogicalRangeChange(() => { clearTimeout(timer); timer = setTimeout(moved, SETTLE_MS); });
  chart.subscribeCrosshairMove(({ logical }) => now && label(logical ?? null));
  model.on("msg:custom", receive);
  window.addEventListener("cr-theme", paint);
  const looking = setInterval(() => {
    try { document.hidden || model.send({ type: "look" }); } catch { clearInterval(looking); } // the kernel has ended
  }, LOOK_MS);
  paint();
  model.send({ type: "ready", width: width() });
  return () => { clearInterval(looking); clearTimeout(timer); window.removeEventListener("cr-theme", paint); model.off("msg:custom", receive); chart.remove(); };
}
export default { render };
