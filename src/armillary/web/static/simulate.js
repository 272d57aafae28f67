// The tab for virtual time: a configuration and a workload are chosen, run, measured, and the engine is watched.

import { getJson, objects, post, ServerError } from "./api.js";
import { figure } from "./chart.js";
import { watch } from "./live.js";
import { open as openSettings } from "./settings.js";
import { body, build, mark, objective, offer } from "./simulation_fields.js";
import { control, Virtual } from "./virtual.js";

const $ = (id) => document.getElementById(id);
const fields = $("simulation-fields");
let offered = false;
let running = null; // AbortController of what is being simulated
let source = null; // the run that is watched
let last = null; // the body of the run that is shown
let curve = null; // {points, slo, capacity, chosen}
let visible = false;

const ms = (ns) => (ns >= 1e10 ? `${(ns / 1e9).toFixed(1)} s` : ns >= 1e9 ? `${(ns / 1e9).toFixed(2)} s` : ns >= 1e8 ? `${(ns / 1e6).toFixed(0)} ms` : ns >= 1e4 ? `${(ns / 1e6).toPrecision(3)} ms` : `${ns} ns`);
const number = (value, digits = 3) => (value >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits))));
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const dollars = (value) => (value === null ? "–" : `$${value.toFixed(2)}`);

/** Whether the tab is looked at; the view beside shows its engine then. */
export async function shown(now) {
  visible = now;
  if (!now) {
    source?.pause();
    control(null);
    $("engine").classList.remove("empty");
    $("engine-title").textContent = "Engine";
    return;
  }
  document.title = "Simulate · Armillary";
  $("engine-title").textContent = "Engine in virtual time";
  beside();
  if (offered) return;
  offered = true;
  try {
    offer(fields, await getJson("/simulate/choices"));
  } catch (error) {
    offered = false;
    fail(error);
  }
}

function beside() {
  $("engine").classList.toggle("empty", source === null);
  control(source);
  watch(source);
}

function fail(error) {
  const known = error instanceof ServerError;
  $("simulation-error").textContent = known ? error.message : "The server cannot be reached. Is it still running?";
  $("simulation-error").hidden = false;
  mark(error.field);
  if (error.status === 401) openSettings("key");
}

/** Does `work` with a signal while the form shows that something runs. */
async function busy(doing, work) {
  if (running) return;
  const controller = new AbortController();
  running = controller;
  $("simulation-error").hidden = true;
  mark(null);
  $("simulate-doing").textContent = doing;
  const began = performance.now();
  const buttons = ["simulate-run", "simulate-capacity", "run-trace"].map($);
  for (const button of buttons) button.disabled = true;
  $("simulate-stop").hidden = false;
  let words = "";
  try {
    await work(controller.signal);
    words = `${((performance.now() - began) / 1000).toFixed(1)} s here`;
  } catch (error) {
    if (controller.signal.aborted) words = "stopped";
    else fail(error);
  }
  running = null;
  for (const button of buttons) button.disabled = false;
  $("simulate-stop").hidden = true;
  $("simulate-doing").textContent = words;
}

const run = () => busy("serving in virtual time", async (signal) => {
  const asked = body("serve");
  const facts = await (await post("/simulate/serve", asked, signal)).json();
  const { slo, ...workload } = asked;
  last = workload;
  showRun(facts);
  source?.close();
  source = facts.replicas ? new Virtual(workload, facts.ends, facts.replicas) : null;
  $("engine-none").textContent = "Prefill and decode workers are not watched yet: give replicas.";
  $("run-watch").disabled = source === null;
  if (visible) beside();
});

const make = (tag, text, name) => {
  const node = document.createElement(tag);
  node.textContent = text;
  if (name) node.className = name;
  return node;
};

function showRun(facts) {
  $("simulation-results").hidden = false;
  $("run-what").textContent = `${facts.model} on ${facts.devices} × ${facts.device}, ${facts.scheduling}`;
  const tiles = [
    ["first token, p50", ms(facts.first_token.p50)], ["a token, p50", ms(facts.per_token.p50)],
    ["tokens / s", number(facts.throughput)], ["$ / M tokens", dollars(facts.dollars_per_million_tokens)],
    ...(facts.slo ? [["keep the SLO", percent(facts.slo.attainment)]] : []),
    ["engine busy", percent(facts.busy)], ["of peak FLOP/s", percent(facts.model_flops_utilization)], ["preemptions", number(facts.preemptions)],
  ];
  $("run-tiles").replaceChildren(...tiles.map(([name, value]) => {
    const node = document.createElement("div");
    node.append(make("dt", name), make("dd", value));
    return node;
  }));
  const rows = [["wait in the queue", facts.wait], ["time to first token", facts.first_token], ["time a token after it, by request", facts.per_token], ["time between tokens", facts.gap]];
  const head = document.createElement("tr");
  head.append(...["", "p50", "p90", "p99"].map((name) => make("th", name)));
  $("run-latencies").replaceChildren(head, ...rows.map(([name, spread]) => {
    const row = document.createElement("tr");
    row.append(make("th", name), ...["p50", "p90", "p99"].map((key) => make("td", ms(spread[key]))));
    return row;
  }));
  $("run-facts").textContent = `${facts.requests.toLocaleString("en")} requests, ${number(facts.prompt_tokens)} prompt and ${number(facts.generated_tokens)} generated tokens in ${ms(facts.makespan)}; `
    + `${number(facts.throughput_per_device)} tokens a second a device, ${facts.iterations.toLocaleString("en")} iterations`;
  $("run-command").textContent = facts.command;
}

const capacity = () => busy("looking for the capacity", async (signal) => {
  const response = await post("/simulate/capacity", body("capacity"), signal);
  curve = { points: [], slo: objective(), capacity: null, chosen: null };
  $("capacity-results").hidden = false;
  $("capacity-what").textContent = "";
  $("capacity-point").textContent = "";
  for await (const told of objects(response)) {
    if (told.command) $("capacity-command").textContent = told.command;
    if (told.probe) {
      curve.points.push(told.probe);
      curve.points.sort((one, other) => one.rate - other.rate);
      $("simulate-doing").textContent = `${curve.points.length} rates tried, the last ${number(told.probe.rate)} a second`;
    } else if (told.capacity) {
      curve.capacity = told.capacity.rate;
      $("capacity-what").textContent = told.capacity.rate
        ? `${number(told.capacity.rate)} requests a second, ${number(told.capacity.per_device)} a device, ${dollars(told.capacity.dollars_per_million_tokens)} a million tokens`
        : `none: of requests one by one ${percent(told.capacity.alone.attainment)} keep the objective`;
    }
    drawCurve();
  }
});

function drawCurve() {
  if (!curve?.points.length) return;
  const { slo, points, capacity, chosen } = curve;
  const charts = [
    { title: "Requests that keep the objective", unit: " %", most: 105, bound: slo.attainment, lines: [{ name: "", of: (point) => 100 * point.attainment }] },
    { title: "Goodput, requests a second", lines: [{ name: "", of: (point) => point.goodput }] },
    { title: "Time to first token, ms", log: true, bound: slo.ttft, lines: [{ name: "p50", of: (point) => point.first_token.p50 / 1e6 }, { name: "p99", of: (point) => point.first_token.p99 / 1e6 }] },
    { title: "Time a token, ms", log: true, bound: slo.tpot, lines: [{ name: "p50", of: (point) => point.per_token.p50 / 1e6 }, { name: "p99", of: (point) => point.per_token.p99 / 1e6 }] },
  ];
  const room = $("capacity-charts").clientWidth;
  const width = Math.max(240, Math.floor(room >= 620 ? (room - 14) / 2 : room));
  $("capacity-charts").replaceChildren(...charts.map((chart) => figure(chart, points, { capacity, chosen, width })));
  $("capacity-charts").dataset.points = points.length;
  tellPoint();
}

function tellPoint() {
  const point = curve.points[curve.chosen];
  $("capacity-point").textContent = point
    ? `${number(point.rate)} a second: ${percent(point.attainment)} keep it; first token ${ms(point.first_token.p50)}, p99 ${ms(point.first_token.p99)}; `
      + `a token ${ms(point.per_token.p50)}, p99 ${ms(point.per_token.p99)}; ${point.requests.toLocaleString("en")} requests${point.holds ? "" : "; lost"}`
    : "Filled: the objective holds. Hollow: it is lost. Dotted: the objective.";
}

async function trace() {
  await busy("writing the trace", async (signal) => {
    const content = await (await post("/simulate/trace", last, signal)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(content);
    link.download = "trace.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });
}

function copier(button, from) {
  $(button).addEventListener("click", async () => {
    const before = $(button).textContent;
    try {
      await navigator.clipboard.writeText($(from).textContent);
      $(button).textContent = "Copied";
    } catch {
      $(button).textContent = "Not allowed";
    }
    setTimeout(() => ($(button).textContent = before), 1200);
  });
}

build(fields);
copier("run-copy", "run-command");
copier("capacity-copy", "capacity-command");
$("simulation").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("simulation").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});
$("simulate-capacity").addEventListener("click", capacity);
$("simulate-stop").addEventListener("click", () => running?.abort());
$("run-trace").addEventListener("click", trace);
$("run-watch").addEventListener("click", () => {
  if ($("engine").hidden) $("toggle-engine").click();
  source.play();
});
const charts = $("capacity-charts");
charts.addEventListener("pointermove", (event) => {
  const frame = event.target.closest("figure");
  if (!frame || event.target.closest("figcaption")) return;
  const chosen = frame.at(event.clientX - frame.getBoundingClientRect().left);
  if (chosen !== curve.chosen) {
    curve.chosen = chosen;
    drawCurve();
  }
});
charts.addEventListener("pointerleave", () => {
  if (!curve) return;
  curve.chosen = null;
  drawCurve();
});
let room = 0;
new ResizeObserver(() => {
  if (charts.clientWidth === room) return;
  room = charts.clientWidth;
  drawCurve();
}).observe(charts);
window.addEventListener("pagehide", () => source?.close());
