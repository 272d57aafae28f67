// The sampling controls. An empty field is not sent, so the server's own default holds.

import { key } from "./api.js";

const STORE = "armillary.settings";
const TEXTS = ["system", "stop"];
const form = document.getElementById("settings-form");
const dialog = document.getElementById("settings");

function load() {
  let saved = {};
  try {
    saved = JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch { /* from another time: start afresh */ }
  for (const field of form.elements) if (field.name && field.name !== "key") field.value = saved[field.name] ?? "";
  form.elements.key.value = key.get();
}

function save() {
  const values = {};
  for (const field of form.elements) if (field.name && field.name !== "key" && field.value !== "") values[field.name] = field.value;
  localStorage.setItem(STORE, JSON.stringify(values));
  key.set(form.elements.key.value.trim());
}

export function open(focus = "system") {
  load();
  dialog.showModal();
  form.elements[focus].focus();
}

/** `{system, fields}`: the system prompt, and the fields of the request. */
export function current() {
  load();
  const fields = {};
  for (const field of form.elements) {
    if (!field.name || field.name === "key" || TEXTS.includes(field.name) || field.value === "") continue;
    fields[field.name] = Number(field.value);
  }
  const stop = form.elements.stop.value.split("\n").filter((line) => line !== "");
  if (stop.length) fields.stop = stop;
  return { system: form.elements.system.value.trim(), fields };
}

dialog.addEventListener("close", save);
document.getElementById("open-settings").addEventListener("click", () => open());
document.getElementById("reset-settings").addEventListener("click", () => {
  for (const field of form.elements) if (field.name && field.name !== "key") field.value = "";
});
load();
