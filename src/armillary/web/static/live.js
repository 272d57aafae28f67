// Asks a source for an engine's state while somebody looks, and shows it: the engine that serves, or one in virtual time.
//
// A source has `state(since, signal)`, a `/live` answer or null when nothing has changed; `story(id)`, lines about a request; `wait(busy)`, the ms
// until it is asked again; `named(state)`, where its name is shown.

import { getJson } from "./api.js";
import { showFeatures } from "./features.js";
import { History } from "./history.js";
import { blocksShown, colour, drawBlocks, drawIterations, iterationAt } from "./picture.js";
import { tell } from "./story.js";

const LOST_MS = 4000;
const ROWS = 12;

const $ = (id) => document.getElementById(id);
const [picture, blocks, tip, requests, pulse, engine] = ["picture", "blocks", "tip", "requests", "pulse", "engine"].map($);
const history = new History();
let timer = null;
let asking = false;
let selected = null;
let source = null;

const watched = () => source && document.visibilityState === "visible" && !engine.hidden;

/** The engine of this server. */
export const served = {
  state: (since, signal) => getJson(`/live?since=${since}`, signal),
  story: async (id) => {
    const { requests } = await getJson(`/requests/${encodeURIComponent(id)}`);
    return requests.flatMap((request) => (requests.length > 1 ? [request.id, ...request.events] : request.events));
  },
  wait: (busy) => (busy ? 250 : 1000),
  named: (state) => {
    for (const id of ["model", "welcome-model"]) $(id).textContent = state.model.name;
    $("model").title = state.model.description;
    document.title = `${state.model.name} · Armillary`;
  },
};

/** Shows another engine; null shows none. */
export function watch(next) {
  source = next;
  pulse.className = "pulse";
  afresh();
}

/** Forgets what was seen: the same source goes on from another instant. */
export function afresh() {
  history.forget();
  picture.dataset.columns = 0;
  wake();
}

async function poll() {
  timer = null;
  if (!watched() || asking) return;
  asking = true;
  const [asked, since] = [source, history.last];
  let wait = LOST_MS;
  try {
    const state = await asked.state(since, AbortSignal.timeout(60_000));
    if (asked !== source || since !== history.last) wait = 0; // somebody wants to see something else meanwhile
    else {
      if (state) {
        history.add(state);
        show(state);
      }
      const busy = history.state !== null && history.state.running + history.state.waiting > 0;
      wait = asked.wait(busy);
      pulse.className = `pulse ${busy ? "busy" : "idle"}`;
      pulse.title = busy ? "Working" : "Idle";
    }
  } catch (error) {
    pulse.className = "pulse lost";
    pulse.title = error.message;
  }
  asking = false;
  if (watched()) timer = setTimeout(poll, wait);
}

/** Look now: something is about to happen. */
export function wake() {
  clearTimeout(timer);
  poll();
}

function show(state) {
  source.named(state);
  $("policy").textContent = state.policy;
  $("policy").title = "The scheduler policy";
  $("tile-rate").textContent = history.rate === null ? "–" : history.rate >= 100 ? Math.round(history.rate) : history.rate.toFixed(1).replace(/\.0$/, "");
  $("tile-running").textContent = state.running;
  $("tile-waiting").textContent = state.waiting;
  $("tile-step").textContent = history.step === null ? "–" : history.step < 10 ? `${history.step.toFixed(1)} ms` : `${Math.round(history.step)} ms`;
  const { used, kept, total, block_size: size } = state.blocks;
  const shown = blocksShown(history);
  $("blocks-text").textContent = `${used} of ${total} blocks of ${size} tokens${kept ? `, ${kept} kept for prompts that begin alike` : ""}${shown < total ? ` · the bar shows ${shown}` : ""}`;
  blocks.setAttribute("aria-label", `${used} of ${total} KV blocks in use`);
  picture.setAttribute("aria-label", `${history.iterations.length} iterations; ${state.running} requests running, ${state.waiting} waiting`);
  picture.dataset.columns = history.iterations.length;
  list(state);
  draw();
  showFeatures(state.features);
}

function draw() {
  drawIterations(picture, history, selected);
  drawBlocks(blocks, history);
  for (const { firstChild: node } of requests.children) if (node.dataset.id) node.firstChild.style.background = colour(history.number(node.dataset.id));
}

function list(state) {
  $("requests-none").hidden = state.requests.length > 0;
  const rows = state.requests.slice(0, ROWS);
  while (requests.children.length > rows.length) requests.lastChild.remove();
  while (requests.children.length < rows.length) requests.append(row());
  rows.forEach((request, index) => {
    const node = requests.children[index].firstChild;
    const [, what, count, progress] = node.children;
    node.dataset.id = request.id;
    const prompt = request.computed < request.prompt;
    what.textContent = request.held && request.phase !== "decode" ? `${request.phase}: ${request.held}` : request.phase;
    count.textContent = prompt ? `${request.computed} / ${request.prompt} prompt` : `${request.known - request.prompt} of ≤ ${request.max_length - request.prompt}`;
    progress.max = prompt ? request.prompt : Math.max(1, request.max_length - request.prompt);
    progress.value = prompt ? request.computed : request.known - request.prompt;
  });
  const more = state.running + state.waiting - rows.length;
  if (more > 0 && rows.length) requests.lastChild.firstChild.children[1].textContent += ` (and ${more} more)`;
}

function row() {
  const item = document.createElement("li");
  const node = document.createElement("button");
  node.type = "button";
  node.title = "Why is it where it is?";
  for (const name of ["swatch", "what", "count"]) {
    const span = document.createElement("span");
    span.className = name;
    node.append(span);
  }
  node.append(document.createElement("progress"));
  node.addEventListener("click", () => tell(source.story(node.dataset.id)));
  item.append(node);
  return item;
}

function point(index) {
  selected = index;
  const iteration = index === null ? null : history.iterations[index];
  tip.hidden = !iteration;
  if (iteration) {
    const prompt = iteration.rows.filter((cell) => cell.tokens > 1);
    const lines = [
      `iteration ${iteration.index}: ${((iteration.end - iteration.start) / 1e6).toFixed(1)} ms`,
      `${iteration.tokens} tokens in ${iteration.rows.length} requests`,
      ...(prompt.length ? [`prompt: ${prompt.map((cell) => cell.tokens).join(" + ")} tokens`] : []),
      ...(iteration.preempted.length ? [`${iteration.preempted.length} preempted`] : []),
      `${iteration.blocks_used} KV blocks`,
    ];
    tip.textContent = lines.join("\n");
    const right = index > history.iterations.length / 2;
    tip.style.left = right ? ".4rem" : "auto";
    tip.style.right = right ? "auto" : ".4rem";
  }
  draw();
}

picture.addEventListener("pointermove", (event) => point(iterationAt(picture, history, event.offsetX)));
picture.addEventListener("pointerleave", () => point(null));
picture.addEventListener("blur", () => point(null));
picture.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || !history.iterations.length) return;
  event.preventDefault();
  const from = selected ?? history.iterations.length - (step < 0 ? 0 : 1);
  point(Math.max(0, Math.min(history.iterations.length - 1, from + step)));
});
document.addEventListener("visibilitychange", wake);
new ResizeObserver(draw).observe(picture);
export { draw };
