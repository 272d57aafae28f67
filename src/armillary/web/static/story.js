// Why a request got what it got: the scheduler's own words.

const dialog = document.getElementById("story");
const list = document.getElementById("story-events");

/** Shows what `story`, a promise of lines, tells. */
export async function tell(story) {
  let lines;
  try {
    lines = await story;
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
