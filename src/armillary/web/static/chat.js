// The conversation: what was said, sending, streaming, stopping.

import { chat, ServerError } from "./api.js";
import { served } from "./live.js";
import { render } from "./markdown.js";
import { current, open as openSettings } from "./settings.js";
import { tell } from "./story.js";

const $ = (id) => document.getElementById(id);
const [messages, scroll, prompt, send, stop, welcome] = ["messages", "scroll", "prompt", "send", "stop", "welcome"].map($);
let history = []; // [{role, content}]
let running = null; // AbortController of the answer being written

const button = (label, title, action) => {
  const node = document.createElement("button");
  node.type = "button";
  node.className = "plain";
  node.textContent = label;
  node.title = title;
  node.addEventListener("click", action);
  return node;
};

async function copy(text, node) {
  const before = node.textContent;
  try {
    await navigator.clipboard.writeText(text);
    node.textContent = "Copied";
  } catch {
    node.textContent = "Not allowed";
  }
  setTimeout(() => (node.textContent = before), 1200);
}

function bubble(role) {
  const item = document.createElement("li");
  item.className = `message ${role}`;
  const text = document.createElement("div");
  text.className = "text";
  const foot = document.createElement("div");
  foot.className = "foot";
  item.append(text);
  if (role === "assistant") item.append(foot);
  messages.append(item);
  welcome.hidden = true;
  return { item, text, foot };
}

const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
const toEnd = () => (scroll.scrollTop = scroll.scrollHeight);

function busy(controller) {
  running = controller;
  send.hidden = controller !== null;
  stop.hidden = controller === null;
}

async function answer() {
  const said = history; // a new chat begins another list: what is still being written belongs to this one
  const { system, fields } = current();
  const view = bubble("assistant");
  view.item.classList.add("writing");
  toEnd();
  const controller = new AbortController();
  busy(controller);
  const sent = performance.now();
  let text = "", id = null, first = null, last = null, usage = null, reason = null, failure = null, due = false;
  const draw = () => {
    due = false;
    const follow = atEnd();
    render(view.text, text);
    if (follow) toEnd();
  };
  try {
    const asked = system ? [{ role: "system", content: system }, ...said] : said;
    for await (const chunk of chat({ messages: asked, ...fields }, controller.signal)) {
      id = chunk.id;
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (choice.delta.content) text += choice.delta.content;
      last = performance.now();
      first ??= last;
      if (!due) {
        due = true;
        requestAnimationFrame(draw);
      }
    }
  } catch (error) {
    failure = error;
  }
  draw();
  view.item.classList.remove("writing");
  if (running === controller) busy(null);
  const stopped = controller.signal.aborted;
  if (failure && !stopped) fail(view, failure);
  if (text || !failure) said.push({ role: "assistant", content: text });
  finish(view, { text, id, usage, reason, stopped, failure, waited: first && first - sent, wrote: first && last - first });
  if (!document.activeElement || document.activeElement === document.body) prompt.focus({ preventScroll: true });
}

function fail(view, error) {
  const box = document.createElement("div");
  box.className = "failure";
  box.role = "alert";
  const known = error instanceof ServerError;
  box.textContent = known ? error.message : "The server cannot be reached. Is it still running?";
  view.text.after(box);
  if (error.status === 401) openSettings("key");
}

function finish(view, { text, id, usage, reason, stopped, failure, waited, wrote }) {
  const facts = [];
  if (usage) {
    facts.push(`${usage.completion_tokens} tokens`);
    if (wrote > 0 && usage.completion_tokens > 1) facts.push(`${((usage.completion_tokens - 1) / wrote * 1000).toFixed(1)} / s`);
  }
  if (waited !== null) facts.push(`first after ${waited < 950 ? `${Math.round(waited)} ms` : `${(waited / 1000).toFixed(1)} s`}`);
  if (stopped) facts.push("stopped");
  else if (reason === "length") facts.push("reached its length limit");
  const words = document.createElement("span");
  words.className = "facts";
  words.textContent = facts.join(" · ");
  for (const old of messages.querySelectorAll("[data-again]")) old.remove();
  const again = button(failure && !stopped ? "Try again" : "Again", "Answer once more", () => {
    if (running) return;
    if (history.at(-1)?.role === "assistant") history.pop();
    view.item.remove();
    answer();
  });
  again.dataset.again = "";
  const copier = button("Copy", "Copy the answer as it was written", () => copy(text, copier));
  view.foot.replaceChildren(...(text ? [copier] : []), again, ...(id ? [button("Why?", "What the scheduler did with this request", () => tell(served.story(id)))] : []), words);
  if (atEnd()) toEnd();
}

export function say(text) {
  if (running || !text.trim()) return;
  history.push({ role: "user", content: text });
  bubble("user").text.textContent = text;
  prompt.value = "";
  fit();
  answer();
}

export function halt() {
  running?.abort();
}

export function clear() {
  halt();
  busy(null);
  history = [];
  messages.replaceChildren();
  welcome.hidden = false;
  prompt.focus();
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
  send.disabled = !prompt.value.trim();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  say(prompt.value);
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    say(prompt.value);
  }
});
stop.addEventListener("click", halt);
messages.addEventListener("click", (event) => {
  const node = event.target.closest("[data-copy]");
  if (node) copy(node.parentElement.querySelector("code").textContent, node);
});
fit();
