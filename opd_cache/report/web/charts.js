// Curves: a uPlot canvas, a legend of buttons with the values under the pointer, and the same numbers as a table.

import uPlot from "uplot";

import { asNumber, el, missing, short } from "opd/dom.js";
import { dataTable } from "opd/table.js";

const HEIGHT = 226;
const FEW_POINTS = 60; // up to so many get a dot each
const COLORS = 8; // of the style sheet: --series-1 to --series-8
const DASHES = [[], [7, 5], [2, 4], [10, 4, 2, 4]];
const drawn = new Set();

/** The theme has changed: colours are looked up again. */
export function redrawCharts() {
  for (const one of drawn) {
    if (one.element.isConnected) one.plot?.redraw(false);
    else drawn.delete(one);
  }
}

function color(name) {
  const probe = el("span", { vars: { color: `var(${name})` } });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export const seriesColor = (index) => `--series-${(index % COLORS) + 1}`;

/**
 * A figure. series: {label, x, y, color, dash}, each with places of its own; color and dash are numbers. format(value)
 * writes a value, isShare has the axis in per cent. Returns null where no series has a value.
 */
export function lineChart({ title, note, xLabel, series, format, fromZero = false, isShare = false }) {
  const kept = series
    .map((one) => ({ ...one, y: (one.y ?? []).map(asNumber) }))
    .filter((one) => one.y.some((value) => value !== null && Number.isFinite(value)));
  if (kept.length === 0) return null;
  const aligned = align(kept);
  const plotBox = el("div", { class: "plot", role: "img", "aria-label": `${title}. ${kept.map((one) => spoken(one, xLabel, format)).join(" ")}` });
  const where = el("span", { class: "where" });
  const legend = kept.map((one) => legendEntry(one, format));
  const state = { element: plotBox, plot: null };
  legend.forEach((entry, index) => entry.button.addEventListener("click", () => toggle(state, entry, index)));
  const build = (width) => makePlot(plotBox, width, aligned, kept, { legend, where, xLabel, format, fromZero, isShare });
  fitted(state, build);
  return el("figure", { class: "card chart" },
    el("figcaption", {}, el("h2", {}, title), note ? el("p", { class: "note" }, note) : null),
    el("div", { class: "legend" }, legend.map((entry) => entry.button), where),
    plotBox,
    numbers(title, xLabel, aligned, kept, format));
}

function fitted(state, build) {
  drawn.add(state);
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width <= 0) return;
    if (state.plot) state.plot.setSize({ width, height: state.plot.height });
    else state.plot = build(width);
  }).observe(state.element);
}

function makePlot(box, width, aligned, series, { legend, where, xLabel, format, fromZero, isShare }) {
  const axis = { stroke: () => color("--soft"), grid: { stroke: () => color("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const isFew = aligned[0].length <= FEW_POINTS;
  const options = {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { y: false, points: { size: 7 } },
    scales: { x: { time: false, range: padded }, y: { range: (_, low, high) => valueRange(low, high, fromZero) } },
    series: [{}, ...series.map((one) => ({
      label: one.label,
      stroke: () => color(seriesColor(one.color)),
      width: 2,
      dash: DASHES[one.dash % DASHES.length],
      spanGaps: true,
      points: { show: isFew, size: 5, fill: () => color(seriesColor(one.color)) },
    }))],
    axes: [
      { ...axis, size: 26, label: xLabel, labelSize: 18, labelFont: axis.font, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6] },
      { ...axis, size: 56, values: (_, values) => values.map((value) => (isShare ? `${tick(value * 100)} %` : short(value))) },
    ],
    hooks: { setCursor: [(plot) => tell(plot.cursor.idx, aligned, legend, where, xLabel, format)] },
  };
  return new uPlot(options, aligned, box);
}

const tick = (value) => String(Number(value.toPrecision(3))).replace("-", "−");

const padded = (_, low, high) => [low - Math.max(0.5, (high - low) * 0.01), high + Math.max(0.5, (high - low) * 0.01)];

function valueRange(low, high, fromZero) {
  if (low === null) return [0, 1];
  const from = fromZero ? Math.min(0, low) : low;
  const room = (high - from || Math.abs(high) || 1) * 0.08;
  return [fromZero && low >= 0 ? 0 : from - room, high + room];
}

/** One list of places for all series, and their values there. */
function align(series) {
  const places = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const index = new Map(places.map((x, place) => [x, place]));
  return [places, ...series.map((one) => {
    const values = new Array(places.length).fill(null);
    one.x.forEach((x, position) => {
      if (Number.isFinite(one.y[position])) values[index.get(x)] = one.y[position];
    });
    return values;
  })];
}

function legendEntry(one, format) {
  const last = one.y.findLast((value) => value !== null);
  const value = el("b", {}, format(last));
  const swatch = el("span", { class: `swatch dash-${one.dash % DASHES.length}`, "aria-hidden": "true", vars: { "--color": `var(${seriesColor(one.color)})` } });
  const button = el("button", { type: "button", "aria-pressed": "true" }, swatch, el("span", {}, one.label), value);
  return { button, value, last: format(last) };
}

function toggle(state, { button }, index) {
  const isShown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(isShown));
  state.plot?.setSeries(index + 1, { show: isShown });
}

function tell(place, aligned, legend, where, xLabel, format) {
  const isOver = place !== null && place !== undefined;
  where.textContent = isOver ? `${xLabel} ${aligned[0][place]}` : "";
  legend.forEach((entry, index) => {
    const value = isOver ? aligned[index + 1][place] : undefined;
    entry.value.textContent = isOver ? (value === null ? missing : format(value)) : entry.last;
  });
}

function spoken(one, xLabel, format) {
  const known = one.x.map((x, index) => [x, one.y[index]]).filter(([, value]) => value !== null);
  const [first, last] = [known[0], known[known.length - 1]];
  return `${one.label}: ${format(first[1])} at ${xLabel} ${first[0]}, ${format(last[1])} at ${xLabel} ${last[0]}.`;
}

function numbers(title, xLabel, aligned, series, format) {
  const details = el("details", {}, el("summary", {}, "Numbers"));
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return;
    const columns = [{ label: xLabel, numeric: true, show: (row) => String(aligned[0][row]) }, ...series.map((one, index) => ({
      label: one.label, numeric: true, show: (row) => (aligned[index + 1][row] === null ? missing : format(aligned[index + 1][row])),
    }))];
    details.append(dataTable(title, columns, aligned[0].map((_, row) => row)));
  });
  return details;
}

/** Bars of one value a token; onChoose(place) is told which one was clicked. */
export function barStrip({ label, values, height = 96, onChoose }) {
  const shown = values.map((value) => (Number.isFinite(value) ? value : null));
  const box = el("div", { class: "plot strip", role: "img", "aria-label": label });
  const state = { element: box, plot: null };
  const bars = uPlot.paths.bars({ size: [0.9, 14], gap: 0 });
  const part = (name) => ({ stroke: () => color(name), fill: () => color(name), paths: bars, width: 0, points: { show: false } });
  fitted(state, (width) => {
    const plot = new uPlot({
      width,
      height,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: { x: { time: false, range: (_, low, high) => [low - 0.5, high + 0.5] }, y: { range: (_, low, high) => [Math.min(low ?? 0, -0.5), Math.max(high ?? 0, 0.5)] } },
      axes: [{ show: false }, { stroke: () => color("--soft"), grid: { stroke: () => color("--grid"), width: 1 }, ticks: { show: false }, size: 40, font: "11px system-ui, sans-serif", space: 24 }],
      series: [{}, part("--heat-bad"), part("--heat-good")],
    }, [shown.map((_, place) => place), shown.map((value) => (value !== null && value < 0 ? value : null)), shown.map((value) => (value !== null && value >= 0 ? value : null))], box);
    plot.over.addEventListener("click", () => plot.cursor.idx !== null && onChoose(plot.cursor.idx));
    return plot;
  });
  return box;
}
