// The form of a simulation: its fields are flags of `armillary simulate`, and what is empty has the flag's default.

const STORE = "armillary.simulation";
const BOTH = ["serve", "capacity", "trace", "watch"];
const RUN = ["serve", "trace", "watch"];

// name, label, kind, placeholder (the default), where its names come from, which verbs take it (all but with `only`)
const GROUPS = [
  ["Model and hardware", [
    { name: "model", label: "Model", kind: "text", value: "llama-2-7b", list: "models", title: "A published architecture, or the model that is served" },
    { name: "cluster", label: "Cluster", kind: "text", value: "a100", list: "clusters", title: "Such as h100, 8xh100, dgx-a100:4 or h100x8:2/ib-ndr" },
    { name: "tensor_parallel", label: "Tensor parallel", kind: "whole", placeholder: "1", min: 1 },
    { name: "pipeline_parallel", label: "Pipeline parallel", kind: "whole", placeholder: "1", min: 1 },
    { name: "replicas", label: "Replicas", kind: "whole", placeholder: "1", min: 1 },
    { name: "router", label: "Router", kind: "choice", list: "routers", placeholder: "power-of-two" },
  ]],
  ["Engine", [
    { name: "policy", label: "Policy", kind: "choice", list: "policies", placeholder: "sarathi" },
    { name: "max_batch_tokens", label: "Tokens an iteration", kind: "whole", placeholder: "512", min: 1, title: "The budget of chunked prefill" },
    { name: "max_running", label: "Most running", kind: "whole", placeholder: "128", min: 1 },
    { name: "quantize", label: "Weights", kind: "choice", options: ["none", "fp16", "int8", "int4"], placeholder: "fp16" },
  ]],
  ["Workload", [
    { name: "lengths", label: "Lengths", kind: "text", list: "lengths", placeholder: "conversation", title: "A published trace's, or PROMPT+ANSWER tokens such as 512+128" },
    { name: "rate", label: "Requests a second", kind: "number", value: "3", only: RUN, title: "Over all replicas" },
    { name: "requests", label: "Requests", kind: "whole", placeholder: "1000", value: "500", min: 1, only: RUN },
    { name: "variation", label: "Arrivals' variation", kind: "number", placeholder: "1", title: "Coefficient of variation of the gaps: 1 is Poisson, more is bursty" },
  ]],
  ["Objective (SLO)", [
    { name: "slo", key: "ttft", label: "First token, ms", kind: "number", value: "300", only: ["serve", "capacity"], title: "Bound on the time to first token (TTFT)" },
    { name: "slo", key: "tpot", label: "Each token, ms", kind: "number", value: "50", only: ["serve", "capacity"], title: "Bound on the mean time a token after the first (TPOT)" },
    { name: "slo", key: "attainment", label: "Kept by, %", kind: "number", value: "90", only: ["serve", "capacity"], title: "The share of requests that must keep both" },
  ]],
];
const MORE = [
  ["Conversations", [
    { name: "sessions", label: "Sessions", kind: "whole", min: 1, only: RUN, title: "So many conversations instead of single requests" },
    { name: "turns", label: "Turns of a session", kind: "text", placeholder: "4", only: RUN, title: "Their mean, or bounds such as 2..6" },
    { name: "think", label: "Time between turns", kind: "text", placeholder: "20s", only: RUN },
    { name: "system_prompt", label: "System prompt", kind: "text", placeholder: "0", only: RUN, title: "Tokens that all sessions begin with, such as 1000, or 1000x8" },
  ]],
  ["Prefill and decode apart", [
    { name: "prefill_workers", label: "Prefill workers", kind: "whole", min: 1, title: "Engines for prompts alone (disaggregation); no replicas then" },
    { name: "decode_workers", label: "Decode workers", kind: "whole", min: 1 },
    { name: "decode_tensor_parallel", label: "Decode's tensor parallel", kind: "whole", min: 1, placeholder: "as above" },
    { name: "decode_pipeline_parallel", label: "Decode's pipeline parallel", kind: "whole", min: 1, placeholder: "as above" },
    { name: "kv_link", label: "Link of keys and values", kind: "text", placeholder: "the fabric" },
  ]],
  ["Second copies", [
    { name: "tail", label: "Of a request", kind: "choice", options: ["none", "hedged", "tied"], placeholder: "none", title: "Of a request: when it is late, or in two queues" },
    { name: "hedge_budget", label: "Budget", kind: "number", placeholder: "0.05", title: "Share of prompt tokens that hedging may compute twice" },
  ]],
  ["What an iteration costs", [
    { name: "pipeline_batches", label: "Pipeline batches", kind: "whole", min: 1, placeholder: "as stages", title: "In flight over the pipeline's stages; one batch can be watched" },
    { name: "profile", label: "Measured operations", kind: "choice", options: ["a100", "h100"], placeholder: "roofline", title: "Llama-2 7B and 70B as the Vidur project measured them" },
    { name: "host_us", label: "Host, µs an iteration", kind: "number", placeholder: "0" },
    { name: "async_scheduling", label: "Schedules ahead", kind: "choice", options: ["on", "off"], placeholder: "off" },
  ]],
  ["The queue", [
    { name: "order", label: "Order", kind: "choice", list: "orders", placeholder: "fcfs" },
    { name: "victim", label: "Who is preempted", kind: "choice", options: ["last", "cost"], placeholder: "last" },
    { name: "tbt_target", label: "Between tokens", kind: "text", placeholder: "no target" },
    { name: "max_wait", label: "Longest wait", kind: "text", placeholder: "60s" },
    { name: "max_queue", label: "Longest queue", kind: "whole", min: 1, placeholder: "1000000" },
  ]],
  ["KV cache", [
    { name: "kv_dtype", label: "Keys and values", kind: "choice", options: ["fp32", "fp16", "fp8", "int8"], placeholder: "fp16" },
    { name: "kv_memory", label: "KV pool", kind: "text", placeholder: "what is left" },
    { name: "kv_blocks", label: "KV blocks", kind: "whole", min: 1 },
    { name: "block_size", label: "Tokens a block", kind: "whole", min: 1, placeholder: "16" },
    { name: "prefix_cache", label: "Prefix cache", kind: "choice", options: ["on", "off"], placeholder: "on" },
    { name: "context", label: "Context", kind: "whole", min: 1, placeholder: "the model's" },
  ]],
  ["KV policy", [
    { name: "kv_policy", label: "Policy", kind: "choice", options: ["dense", "streaming", "h2o", "quest", "minference", "infllm"], placeholder: "dense" },
    { name: "kv_sinks", label: "Sinks", kind: "whole", min: 0, placeholder: "4" },
    { name: "kv_window", label: "Window", kind: "whole", min: 1, placeholder: "1024" },
    { name: "kv_budget", label: "Budget", kind: "whole", min: 1, placeholder: "1024" },
    { name: "kv_dense_layers", label: "Dense layers", kind: "whole", min: 0, placeholder: "0" },
  ]],
  ["Drafts", [
    { name: "speculate", label: "By", kind: "choice", options: ["off", "ngram", "layers", "model"], placeholder: "off" },
    { name: "acceptance", label: "How often right", kind: "text", title: "Such as 0.7, or 0.6,0.8@0.5" },
    { name: "draft_model", label: "Draft model", kind: "text", list: "models" },
    { name: "draft_tokens", label: "Drafted tokens", kind: "whole", min: 1 },
    { name: "draft_layers", label: "Drafting layers", kind: "number", title: "Share of the layers, with drafts by layers" },
  ]],
  ["Adapters", [
    { name: "adapters", label: "How many", kind: "whole", min: 1, only: RUN, title: "So many LoRA adapters, one of which each request asks for" },
    { name: "adapter_rank", label: "Rank", kind: "whole", min: 1, placeholder: "16", only: RUN },
    { name: "adapter_skew", label: "Skew", kind: "number", placeholder: "1", only: RUN, title: "The i-th is asked for in proportion to i to the minus this" },
  ]],
  ["The search", [
    { name: "tolerance", label: "Capacity within", kind: "number", placeholder: "0.1", only: ["capacity"], title: "Relative bracket of the capacity" },
    { name: "seed", label: "Seed", kind: "whole", min: 0, placeholder: "0" },
  ]],
];
const FIELDS = [...GROUPS, ...MORE].flatMap(([, fields]) => fields);
const idOf = (field) => `sim-${field.key ?? field.name}`;

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

function control(field) {
  const { kind, placeholder = "", title = "" } = field;
  if (kind === "choice") {
    const first = make("option", { value: "", textContent: placeholder });
    return make("select", { id: idOf(field), title }, first, ...(field.options ?? []).filter((name) => name !== placeholder).map((name) => make("option", { value: name, textContent: name })));
  }
  const input = make("input", { id: idOf(field), placeholder, title, type: kind === "text" ? "text" : "number", autocomplete: "off", spellcheck: false });
  if (kind !== "text") Object.assign(input, { step: kind === "whole" ? "1" : "any", min: field.min ?? "0" });
  if (field.list) input.setAttribute("list", `names-${field.list}`);
  return input;
}

/** Fills `node` with the fields, as they were left the last time. */
export function build(node) {
  let saved = {};
  try {
    saved = JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch { /* from another time: start afresh */ }
  const group = ([title, fields]) => {
    const grid = make("div", { className: "grid" }, ...fields.map((field) => make("label", {}, field.label, control(field))));
    return make("fieldset", {}, make("legend", { textContent: title }), grid);
  };
  const more = make("details", {}, make("summary", { textContent: "More" }), ...MORE.map(group));
  node.append(...GROUPS.map(group), more);
  for (const field of FIELDS) document.getElementById(idOf(field)).value = saved[idOf(field)] ?? field.value ?? "";
  more.open = MORE.some(([, fields]) => fields.some((field) => saved[idOf(field)]));
  node.addEventListener("input", () => {
    const values = Object.fromEntries(FIELDS.map((field) => [idOf(field), document.getElementById(idOf(field)).value]));
    localStorage.setItem(STORE, JSON.stringify(values));
  });
}

/** What the server knows by name, for the fields that take names. */
export function offer(node, choices) {
  const words = (one) => (typeof one === "string" ? "" : one.title ?? (one.parameters ? `${Number((one.parameters / 1e9).toPrecision(3))}B parameters` : ""));
  const lists = { models: [...choices.served.map((name) => ({ name, title: "served here" })), ...choices.models], clusters: choices.clusters, lengths: choices.lengths };
  for (const [name, list] of Object.entries(lists)) {
    node.append(make("datalist", { id: `names-${name}` }, ...list.map((one) => make("option", { value: one.name ?? one, label: words(one) }))));
  }
  for (const field of FIELDS.filter((one) => one.kind === "choice" && one.list)) {
    const select = document.getElementById(idOf(field));
    const before = JSON.parse(localStorage.getItem(STORE) ?? "{}")?.[idOf(field)] ?? "";
    select.append(...choices[field.list].filter((name) => name !== field.placeholder).map((name) => make("option", { value: name, textContent: name })));
    select.value = before;
  }
}

/** The body of a request for `verb`: only what was filled in. */
export function body(verb) {
  const found = {};
  const bounds = [];
  for (const field of FIELDS) {
    const text = document.getElementById(idOf(field)).value.trim();
    if (text === "" || !(field.only ?? BOTH).includes(verb)) continue;
    if (field.key === "attainment") bounds.push(`attainment=${Number((Number(text) / 100).toPrecision(6))}`);
    else if (field.key) bounds.push(`${field.key}=${text}ms`);
    else found[field.name] = field.kind === "whole" || field.kind === "number" ? Number(text) : text;
  }
  if (bounds.some((bound) => !bound.startsWith("attainment"))) found.slo = bounds.join(",");
  return found;
}

/** Marks the field that an error is about, and no other. */
export function mark(name) {
  for (const field of FIELDS) {
    const node = document.getElementById(idOf(field));
    const wrong = field.name === name && (!field.key || field.key === "ttft");
    node.setAttribute("aria-invalid", String(wrong));
    if (wrong) node.closest("details")?.setAttribute("open", "");
  }
}

/** The bounds in ns by name, as the form has them. */
export function objective() {
  const read = (key) => Number(document.getElementById(`sim-${key}`).value) || null;
  return { ttft: read("ttft"), tpot: read("tpot"), attainment: read("attainment") ?? 90 };
}
