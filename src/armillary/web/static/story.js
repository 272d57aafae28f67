// Why a request got what it got: the scheduler's own words.

import { getJson } from "./api.js";

const dialog = document.getElementById("story");
const list = document.getElementById("story-events");

export async function tell(id) {
  let lines;
  try {
    const { requests } = await getJson(`/requests/${encodeURIComponent(id)}`);
    lines = requests.flatMap((request) => (requests.length > 1 ? [request.id, ...request.events] : request.events));
  } catch (error) {
    lines = [error.message];
  }
  list.replaceChildren(...lines.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  }));
  dialog.showModal();
}
