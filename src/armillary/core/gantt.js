// Draws a trace with plotly.js: one bar a span where there is room, one for many where they would be narrower than a pixel.
// The same cells as core/trace_bars.py, computed again for whatever part of the trace is in view, so zooming in reveals each span.
// `trace` is the columns that core/trace_gantt.py writes; times are ns after the trace's start.
function armillaryGantt(element, trace) {
  "use strict";
  const MOST_BARS = 6000; // SVG bars stay fluid up to about this many
  const units = [["ns", 1], ["µs", 1e3], ["ms", 1e6], ["s", 1e9]];
  const unit = [...units].reverse().find(([, scale]) => trace.extent >= 2 * scale) || units[0];
  const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const shorten = (text) => (text.length > 40 ? text.slice(0, 39) + "…" : text);
  const duration = (ns) => {
    const [name, scale] = [...units].reverse().find(([, scale]) => ns >= scale) || units[0];
    return Number((ns / scale).toPrecision(4)) + " " + name;
  };

  // Spans of each lane, by start.
  const lanes = trace.lanes.map(() => []);
  trace.lane.forEach((lane, i) => lanes[lane].push(i));
  lanes.forEach((own) => own.sort((a, b) => trace.start[a] - trace.start[b] || trace.end[a] - trace.end[b]));

  function barsOf(lane, from, to, cellSize) {
    const drawn = [];
    let cell = null; // the open cell: its number, its spans, the time of each kind
    let last = null; // the last bar made of cells, and its cell
    const close = () => {
      if (!cell) return;
      let kind = cell.kinds.keys().next().value;
      for (const [name, time] of cell.kinds) if (time > cell.kinds.get(kind)) kind = name;
      if (last && last.cell === cell.number - 1 && last.bar.kind === kind) {
        last.bar.end = Math.max(last.bar.end, cell.end);
        last.bar.spans += cell.spans;
        last.bar.busy += cell.busy;
        last.cell = cell.number;
      } else {
        const bar = { lane, kind, start: cell.start, end: cell.end, spans: cell.spans, busy: cell.busy, first: cell.first };
        drawn.push(bar);
        last = { bar, cell: cell.number };
      }
      cell = null;
    };
    for (const i of lanes[lane]) {
      const start = trace.start[i], end = trace.end[i];
      if (start > to) break;
      if (end < from) continue;
      if (end - start >= cellSize) {
        drawn.push({ lane, kind: trace.kind[i], start, end, spans: 1, busy: end - start, first: i });
        continue;
      }
      const number = Math.floor(start / cellSize);
      if (cell && cell.number !== number) close();
      if (!cell) cell = { number, start, end, spans: 0, busy: 0, first: i, kinds: new Map() };
      cell.end = Math.max(cell.end, end);
      cell.spans += 1;
      cell.busy += end - start;
      cell.kinds.set(trace.kind[i], (cell.kinds.get(trace.kind[i]) || 0) + end - start);
    }
    close();
    return drawn;
  }

  function hover(bar) {
    const lines = [`<b>${escape(trace.kinds[bar.kind])}</b> on ${escape(trace.lanes[bar.lane])}`];
    lines.push(`${duration(bar.end - bar.start)} from ${duration(bar.start)}`);
    if (bar.spans > 1) {
      lines.push(`${bar.spans} spans too short to draw apart, together ${duration(bar.busy)}`, "zoom in to see each");
      return lines.join("<br>");
    }
    const reason = trace.reasons[trace.reason[bar.first]], sizes = trace.sizes[trace.size[bar.first]];
    if (reason) lines.push(escape(reason));
    if (sizes) lines.push(escape(sizes));
    return lines.join("<br>");
  }

  const tracks = trace.tracks;
  const rows = trace.lanes.length;
  const laneHeight = rows > 60 ? 12 : rows > 20 ? 18 : 26, trackHeight = 110, gap = 34;
  const plotHeight = Math.max(rows * laneHeight, 60) + tracks.length * (trackHeight + gap);
  const lanesFrom = 1 - Math.max(rows * laneHeight, 60) / plotHeight;
  const layout = {
    uirevision: "keep", // redrawing keeps the zoom and the kinds that were switched off
    title: { text: escape(trace.title), x: 0, xref: "paper", font: { size: 15 } },
    height: plotHeight + 112, margin: { l: 8, r: 12, t: 64, b: 48 }, barmode: "overlay", bargap: 0.12, hovermode: "closest",
    dragmode: "zoom", showlegend: true, legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 },
    plot_bgcolor: "#fafafa", paper_bgcolor: "#ffffff", font: { family: "system-ui, sans-serif", size: 12, color: "#222222" },
    xaxis: { range: [0, trace.extent / unit[1] || 1], title: { text: `time [${unit[0]}]` }, anchor: tracks.length ? `y${tracks.length + 1}` : "y", gridcolor: "#e6e6e6", zeroline: false },
    yaxis: {
      domain: [lanesFrom, 1], range: [rows - 0.5, -0.5], fixedrange: true, automargin: true, showgrid: false, zeroline: false,
      tickvals: trace.lanes.map((_, i) => i), ticktext: trace.lanes.map((name) => escape(shorten(name))), tickfont: { size: Math.min(12, laneHeight - 2) },
    },
  };
  tracks.forEach((track, i) => {
    const top = lanesFrom - (i * (trackHeight + gap) + gap) / plotHeight;
    layout[`yaxis${i + 2}`] = {
      domain: [Math.max(0, top - trackHeight / plotHeight), top], fixedrange: true, automargin: true, zeroline: false, gridcolor: "#e6e6e6",
      title: { text: escape(shorten(track.name)), font: { size: 11 } }, rangemode: "tozero",
    };
  });
  const lines = tracks.flatMap((track, i) => track.series.map((series, n) => ({
    type: "scatter", mode: "lines", line: { shape: "hv", width: 1.5, color: trace.colours[(n + 2) % trace.colours.length] },
    name: escape(`${track.name}: ${series.name}`), showlegend: false, x: series.at.map((at) => at / unit[1]), y: series.values, yaxis: `y${i + 2}`,
  })));

  function draw(range) {
    const from = Math.max(range[0] * unit[1], 0), to = Math.min(range[1] * unit[1], trace.extent);
    const pixel = Math.max((to - from) / Math.max(element.clientWidth - 160, 200), 1e-3);
    let cellSize = pixel, bars;
    do {
      bars = trace.lanes.flatMap((_, lane) => barsOf(lane, from, to, cellSize));
      cellSize *= 2;
    } while (bars.length > MOST_BARS && cellSize < 4 * trace.extent);
    // Never thinner than a pixel, and where there is room a pixel of gap, so that equal neighbours stay apart.
    const width = (bar) => { const ns = bar.end - bar.start; return (ns > 5 * pixel ? ns - pixel : Math.max(ns, pixel)) / unit[1]; };
    const data = trace.kinds.map((kind, k) => {
      const own = bars.filter((bar) => bar.kind === k);
      return {
        type: "bar", orientation: "h", name: escape(kind), legendgroup: kind, marker: { color: trace.kind_colours[k], line: { width: 0 } },
        base: own.map((bar) => bar.start / unit[1]), x: own.map(width), y: own.map((bar) => bar.lane),
        hovertext: own.map(hover), hoverinfo: "text", textposition: "none",
      };
    });
    element.armillaryBars = bars.length;
    // plotly.js offers by default to upload the chart to a company's server; a trace stays here.
    const config = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d", "select2d"] };
    return Plotly.react(element, data.concat(lines), layout, config);
  }

  const whole = layout.xaxis.range.slice();
  return draw(whole).then(() => {
    let waiting = null;
    element.on("plotly_relayout", (change) => {
      if (!Object.keys(change).some((key) => key.startsWith("xaxis"))) return;
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        if (change["xaxis.autorange"]) layout.xaxis.range = whole.slice(); // double click: the whole trace again
        else layout.xaxis.range = element.layout.xaxis.range.slice();
        layout.xaxis.autorange = false;
        draw(layout.xaxis.range);
      }, 60);
    });
  });
}
