// Drawing the engine on canvas: columns are iterations, rows are requests; below, the tokens of each iteration.

import { COLUMNS } from "./history.js";

const LIGHT = ["#b3801f", "#2f807c", "#7a5db5", "#bb4f5f", "#3f78bd", "#6d8a2c", "#c4682a", "#5a6a8c"];
const DARK = ["#dfb15c", "#5fb8b2", "#a78fe0", "#e38590", "#7fb0ec", "#a3c262", "#eb9a5e", "#93a3c6"];
const STRIP = 44; // px at the bottom for tokens an iteration
const GAP = 10;

export const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark";
export const colour = (number) => (isDark() ? DARK : LIGHT)[number % LIGHT.length];
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function surface(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function layout(width, height, rows) {
  const column = (width - 2 * GAP) / COLUMNS;
  const body = height - STRIP - 2.5 * GAP;
  return { column, body, row: Math.min(22, body / Math.max(8, rows)) };
}

/** Which iteration lies under `x` pixels, or null. */
export function iterationAt(canvas, history, x) {
  const { column } = layout(canvas.clientWidth, canvas.clientHeight, history.rows);
  const index = Math.floor((x - GAP) / column) - (COLUMNS - history.iterations.length);
  return history.iterations[index] ? index : null;
}

export function drawIterations(canvas, history, selected) {
  if (!canvas.clientWidth) return; // out of sight
  const { context, width, height } = surface(canvas);
  const { column, body, row } = layout(width, height, history.rows);
  const budget = history.state?.limits.max_batch_tokens ?? 512;
  const left = GAP + (COLUMNS - history.iterations.length) * column;
  const grid = ink("--line");
  context.fillStyle = grid;
  context.globalAlpha = 0.55;
  for (let line = 0; line * row <= body - row / 2 && line < Math.max(8, history.rows); line += 1) {
    context.fillRect(GAP, Math.round(GAP + (line + 0.5) * row), width - 2 * GAP, 1);
  }
  context.globalAlpha = 1;
  const bead = Math.max(1.6, Math.min(column * 0.42, row * 0.24));
  history.iterations.forEach((iteration, index) => {
    const x = left + index * column;
    if (index === selected) {
      context.fillStyle = ink("--brass-soft");
      context.fillRect(x, 0, column, height);
    }
    for (const cell of iteration.rows) {
      const middle = GAP + (cell.row + 0.5) * row;
      context.fillStyle = colour(cell.number);
      if (cell.tokens === 1) {
        context.beginPath();
        context.arc(x + column / 2, middle, bead, 0, 2 * Math.PI);
        context.fill();
      } else {
        const tall = row * (0.5 + 0.44 * Math.min(1, Math.log2(cell.tokens) / Math.log2(Math.max(2, budget))));
        context.beginPath();
        context.roundRect(x + 0.5, middle - tall / 2, Math.max(2, column - 1), tall, Math.min(2.5, column / 3));
        context.fill();
      }
    }
    const bar = Math.max(1.5, STRIP * Math.sqrt(iteration.tokens / budget));
    const prompt = iteration.rows.some((cell) => cell.tokens > 1);
    context.fillStyle = prompt ? ink("--brass") : ink("--soft");
    context.globalAlpha = prompt ? 0.9 : 0.45;
    context.fillRect(x + column * 0.12, height - GAP - bar, Math.max(1, column * 0.76), bar);
    context.globalAlpha = 1;
    if (iteration.preempted.length) {
      context.fillStyle = ink("--bad");
      context.beginPath();
      context.moveTo(x, height - GAP - STRIP - 8);
      context.lineTo(x + 6, height - GAP - STRIP - 8);
      context.lineTo(x + 3, height - GAP - STRIP - 2);
      context.fill();
    }
  });
  context.font = "10.5px system-ui, sans-serif";
  context.fillStyle = ink("--raised");
  context.globalAlpha = 0.85;
  context.fillRect(GAP, height - GAP - STRIP - 3, context.measureText("tokens an iteration").width + 6, 14);
  context.globalAlpha = 1;
  context.fillStyle = ink("--soft");
  context.fillText("tokens an iteration", GAP + 2, height - GAP - STRIP + 8);
}

/** How many blocks the bar is wide: the whole pool, or, while little of it is used, enough to see something. */
export function blocksShown(history) {
  const { used, total } = history.state.blocks;
  const peak = history.iterations.reduce((most, iteration) => Math.max(most, iteration.blocks_used), used);
  return Math.min(total, Math.max(64, 2 ** Math.ceil(Math.log2(1.25 * peak + 1))));
}

/** The KV pool as one bar: each request's blocks in its colour, and how full it was at each iteration behind it. */
export function drawBlocks(canvas, history) {
  const { state } = history;
  if (!state || !canvas.clientWidth) return;
  const { context, width, height } = surface(canvas);
  const inner = width - 2 * GAP;
  const total = blocksShown(history);
  const tall = 14;
  const top = height - GAP - tall + 2;
  context.fillStyle = ink("--line");
  context.beginPath();
  context.roundRect(GAP, top, inner, tall, 4);
  context.fill();
  context.save();
  context.clip();
  // Sequences that share blocks claim more than there are: each is shown narrower, and all together as wide as what is used.
  const claimed = state.requests.reduce((sum, request) => sum + request.blocks, 0);
  const share = Math.min(1, state.blocks.used / Math.max(1, claimed));
  let x = GAP;
  for (const request of [...state.requests].sort((a, b) => history.numbers.get(a.id) - history.numbers.get(b.id))) {
    const wide = ((request.blocks * share) / total) * inner;
    context.fillStyle = colour(history.numbers.get(request.id) ?? 0);
    context.fillRect(x, top, wide, tall);
    x += wide;
    if (wide > 3) {
      context.fillStyle = ink("--raised");
      context.fillRect(x - 1, top, 1, tall);
    }
  }
  context.restore();
  const column = inner / COLUMNS;
  const left = GAP + (COLUMNS - history.iterations.length) * column;
  context.strokeStyle = ink("--brass");
  context.lineWidth = 1.4;
  context.beginPath();
  history.iterations.forEach((iteration, index) => {
    const y = top - 4 - (top - 8) * (iteration.blocks_used / total);
    const px = left + (index + 0.5) * column;
    if (index) context.lineTo(px, y);
    else context.moveTo(px, y);
  });
  context.stroke();
}
