// The parts of the engine that tell of themselves, whichever they are: a card each. The server says names and values, this file how they look.

const $ = (id) => document.getElementById(id);
const RATIO = /(ratio|rate|share|acceptance)$/;
const BYTES = /bytes$/;
const MOST_NUMBERS = 12;

const words = (name) => name.replace(/_/g, " ");
const plain = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

/** A value in a few characters: ratios in percent, bytes in their unit, large numbers with separators. */
export function format(name, value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") {
    if (RATIO.test(name)) return `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
    if (BYTES.test(name)) {
      const power = value < 1000 ? 0 : Math.min(4, Math.floor(Math.log10(value) / 3));
      return `${Number((value / 1000 ** power).toPrecision(3))} ${["B", "kB", "MB", "GB", "TB"][power]}`;
    }
    return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toFixed(value < 1 ? 3 : 1)));
  }
  if (Array.isArray(value)) return value.length ? `${value.slice(-MOST_NUMBERS).map((one) => format("", one)).join(" ")}` : "none";
  if (plain(value)) return Object.entries(value).map(([key, one]) => `${words(key)} ${format(key, one)}`).join(", ");
  return String(value);
}

const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};

/** A list of things of a kind (replicas, adapters): a row each, with a dot for how it fares. */
function rows(list) {
  const node = make("ul", "parts");
  for (const one of list) {
    const { name, index, health, features, pid, computing, slowness, ...rest } = one;
    if (rest.role === "both") delete rest.role;
    if (slowness >= 1.5) rest.times_as_slow_as_the_others = slowness;
    const item = make("li");
    item.title = [computing, pid && `process ${pid}`].filter(Boolean).join("; ");
    const dot = make("span", `dot ${health ?? ""}`);
    dot.title = health ?? "";
    const head = make("span", "part", [name ?? (index === undefined ? "" : `${index}`), health].filter(Boolean).join(" · "));
    item.append(dot, head, make("span", "count", facts(rest)));
    for (const [part, state] of Object.entries(features ?? {})) {
      const said = facts(state);
      if (said) item.append(make("span", "inner", `${part}: ${said}`));
    }
    node.append(item);
  }
  return node;
}

function fact(name, value) {
  if (typeof value !== "number" || RATIO.test(name)) return `${words(name)} ${format(name, value)}`;
  return `${format(name, value)} ${words(BYTES.test(name) ? name.replace(/_?bytes$/, "") : name)}`.trim();
}

const facts = (state) => Object.entries(state)
  .filter(([, value]) => value !== 0 && value !== "" && value !== null && !(Array.isArray(value) && !value.length))
  .map(([name, value]) => fact(name, value))
  .join(" · ");

function card(name, state) {
  const node = make("section", "feature");
  const lists = Object.entries(state).filter(([, value]) => Array.isArray(value) && value.some(plain));
  const single = Object.fromEntries(Object.entries(state).filter(([key]) => !lists.some(([list]) => list === key)));
  const ratio = Object.keys(single).find((key) => RATIO.test(key) && typeof single[key] === "number");
  const head = make("h4", "", words(name).replace(/^./, (letter) => letter.toUpperCase()));
  if (ratio) {
    const value = make("span", "value", format(ratio, single[ratio]));
    value.title = words(ratio);
    head.append(value);
  }
  node.append(head);
  if (ratio) {
    const bar = make("progress");
    bar.max = 1;
    bar.value = Math.max(0, Math.min(1, single[ratio]));
    bar.setAttribute("aria-label", `${words(name)}: ${words(ratio)}`);
    node.append(bar);
  }
  const { [ratio]: _, ...rest } = single;
  const said = facts(rest);
  if (said || (!ratio && !lists.length)) node.append(make("p", "quiet", said || "nothing yet"));
  for (const [, list] of lists) node.append(rows(list));
  return node;
}

let before = "";

/** Draws the cards of a `/live` answer, when something in them has changed. */
export function showFeatures(features) {
  const now = JSON.stringify(features ?? {});
  if (now === before) return;
  before = now;
  const cards = Object.entries(features ?? {}).map(([name, state]) => card(name, state));
  $("features").replaceChildren(...cards);
  $("features-title").hidden = cards.length === 0;
}
