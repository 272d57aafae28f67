// Lines over a rate, drawn as SVG: points are filled where the objective holds and hollow where it is lost.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const MARGIN = { left: 46, right: 12, top: 12, bottom: 30 };

function node(tag, attributes = {}, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Round numbers that divide 0 to `most` into at most `count` parts. */
export function ticks(most, count = 5) {
  const rough = most / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, index) => Number((index * step).toPrecision(12)));
}

/** 1, 2 and 5 of every power of ten from `low` to `high`; fewer where that is many. */
export function powers(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const digit of [1, 2, 5]) if (digit * 10 ** power >= low && digit * 10 ** power <= high) found.push(digit * 10 ** power);
  }
  const tens = found.filter((value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9);
  return found.length > 5 && tens.length > 1 ? tens : found;
}

const short = (value) => (value >= 1e4 ? `${Number((value / 1e3).toPrecision(3))}k` : String(Number(value.toPrecision(3))));

/**
 * A figure of `chart`: `title`, `unit`, `lines` of `{name, of}` (a point's value), `log`, `bound` (the objective's), `most` (of the axis).
 * `points` rise in `rate`; `capacity` is marked when it is known; `chosen` is the index of the point that is looked at.
 */
export function figure(chart, points, { capacity, chosen, width }) {
  const frame = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.append(chart.title);
  for (const [index, line] of chart.lines.entries()) {
    const key = document.createElement("span");
    key.className = `key line-${index}`;
    key.textContent = line.name;
    if (line.name) caption.append(" ", key);
  }
  const svg = node("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": `${chart.title} over ${points.length} rates` });
  const [inner, tall] = [width - MARGIN.left - MARGIN.right, HEIGHT - MARGIN.top - MARGIN.bottom];
  const widest = 1.06 * Math.max(...points.map((point) => point.rate), 1e-9);
  const values = points.flatMap((point) => chart.lines.map((line) => line.of(point))).filter((value) => value > 0);
  const all = chart.bound ? [...values, chart.bound] : values;
  const high = chart.most ?? (all.length ? Math.max(...all) : 1) * (chart.log ? 1.5 : 1.08);
  const low = chart.log ? Math.min(...all, high / 2) / 1.5 : 0;
  const x = (rate) => MARGIN.left + (rate / widest) * inner;
  const part = (value) => (chart.log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : value / high);
  const y = (value) => MARGIN.top + tall * (1 - part(value));
  for (const value of chart.log ? powers(low, high) : ticks(high, 4)) {
    svg.append(node("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
    svg.append(node("text", { class: "tick", x: MARGIN.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, short(value) + (chart.unit ?? "")));
  }
  for (const rate of ticks(widest)) svg.append(node("text", { class: "tick", x: x(rate), y: HEIGHT - MARGIN.bottom + 14, "text-anchor": "middle" }, short(rate)));
  svg.append(node("text", { class: "tick", x: width - MARGIN.right, y: HEIGHT - 2, "text-anchor": "end" }, "requests a second"));
  if (chart.bound) svg.append(node("line", { class: "bound", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(chart.bound), y2: y(chart.bound) }));
  if (capacity) {
    svg.append(node("line", { class: "capacity", x1: x(capacity), x2: x(capacity), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    const right = x(capacity) > width - 70;
    svg.append(node("text", { class: "capacity", x: x(capacity) + (right ? -4 : 4), y: HEIGHT - MARGIN.bottom - 5, "text-anchor": right ? "end" : "start" }, short(capacity)));
  }
  for (const [index, line] of chart.lines.entries()) {
    const shown = points.filter((point) => !chart.log || line.of(point) > 0);
    svg.append(node("polyline", { class: `line line-${index}`, points: shown.map((point) => `${x(point.rate).toFixed(1)},${y(line.of(point)).toFixed(1)}`).join(" ") }));
    for (const point of shown) {
      const mark = { class: `mark line-${index}${point.holds ? "" : " lost"}`, cx: x(point.rate), cy: y(line.of(point)), r: point === points[chosen] ? 5 : 3.5 };
      svg.append(node("circle", mark));
    }
  }
  frame.append(caption, svg);
  frame.at = (pixel) => {
    const rate = ((pixel - MARGIN.left) / inner) * widest;
    return points.reduce((best, point, index) => (Math.abs(point.rate - rate) < Math.abs(points[best].rate - rate) ? index : best), 0);
  };
  return frame;
}
