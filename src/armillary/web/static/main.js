// Puts the page together: the theme, the panels, the keys.

import { clear, halt, say } from "./chat.js";
import { draw, served, wake, watch } from "./live.js";
import { open as openSettings } from "./settings.js";
import { shown as simulationShown } from "./simulate.js";

const $ = (id) => document.getElementById(id);
const root = document.documentElement;

const SUGGESTIONS = [
  "What is an armillary sphere?",
  "Write a haiku about waiting in a queue.",
  "Explain gravity to a child.",
  "List three uses for a brass ring.",
];
$("suggestions").append(...SUGGESTIONS.map((text) => {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = text;
  node.addEventListener("click", () => ask(text));
  return node;
}));

function ask(text) {
  say(text);
  setTimeout(wake, 60);
}
$("composer").addEventListener("submit", () => setTimeout(wake, 60));

const THEMES = { "": ["◐", "as the system says"], light: ["☼", "light"], dark: ["☾", "dark"] };
function theme(name) {
  if (name) root.dataset.theme = name;
  else delete root.dataset.theme;
  if (name) localStorage.setItem("armillary.theme", name);
  else localStorage.removeItem("armillary.theme");
  const [sign, words] = THEMES[name];
  $("theme").textContent = sign;
  $("theme").title = `Colours: ${words}`;
  draw();
}
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme(names[(names.indexOf(root.dataset.theme ?? "") + 1) % names.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

const narrow = matchMedia("(max-width: 860px)");
function engine(shown) {
  $("engine").hidden = !shown;
  document.querySelector(".layout").classList.toggle("alone", !shown);
  $("toggle-engine").setAttribute("aria-expanded", String(shown));
  if (!narrow.matches) localStorage.setItem("armillary.engine", shown ? "shown" : "hidden");
  if (shown) wake();
}
const toggle = () => engine($("engine").hidden);
$("toggle-engine").addEventListener("click", toggle);
$("new-chat").addEventListener("click", clear);

const tabs = document.body.dataset.tabs.split(" ");
for (const name of ["chat", "simulate"]) $(`tab-${name}`).addEventListener("click", () => open(name));
$("tabs").hidden = tabs.length < 2;

function open(name) {
  for (const each of ["chat", "simulate"]) {
    $(each).hidden = each !== name;
    $(`tab-${each}`).setAttribute("aria-selected", String(each === name));
  }
  document.body.dataset.tab = name;
  const hash = name === tabs[0] ? "" : `#${name}`;
  if (location.hash !== hash) history.replaceState(null, "", location.pathname + hash);
  simulationShown(name === "simulate");
  if (name === "chat") watch(served);
}

document.addEventListener("keydown", (event) => {
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) halt();
  else if (command && event.key === "e") toggle();
  else if (command && event.key === ",") openSettings();
  else if (command && event.shiftKey && event.key.toLowerCase() === "o") clear();
  else return;
  if (command) event.preventDefault();
});

theme(root.dataset.theme ?? "");
engine(!narrow.matches && localStorage.getItem("armillary.engine") !== "hidden");
open(tabs.includes(location.hash.slice(1)) ? location.hash.slice(1) : tabs[0]);
if (narrow.matches && tabs.includes("chat")) {
  // The name of the model is worth one question even when the engine is out of sight.
  import("./api.js").then(async ({ getJson }) => {
    try {
      $("welcome-model").textContent = (await getJson("/v1/models")).data[0].id;
    } catch { /* a key is needed: the first message will ask for it */ }
  });
}
