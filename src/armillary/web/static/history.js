// What the page remembers of the engine: recent iterations, the row and colour of every request in them, rates.

export const COLUMNS = 120;
const RATE_WINDOW = 2e9; // ns

export class History {
  constructor() {
    this.forget();
  }

  forget() {
    this.iterations = [];
    this.last = -1; // index of the newest iteration seen
    this.lanes = new Map(); // request id -> row
    this.until = new Map(); // request id -> the last iteration that it was seen in: its row is free after that
    this.numbers = new Map(); // request id -> order of appearance, which is its colour
    this.seen = 0;
    this.samples = [];
    this.state = null;
  }

  /** Takes a `/live` answer. */
  add(state) {
    if (this.state && state.iteration < this.state.iteration) this.forget(); // another engine answers now
    this.state = state;
    const alive = new Set(state.requests.map((request) => request.id));
    for (const iteration of state.iterations) for (const [id] of iteration.entries) this.until.set(id, iteration.index);
    for (const iteration of state.iterations) {
      for (const id of this.lanes.keys()) if (!alive.has(id) && !(this.until.get(id) >= iteration.index)) this.lanes.delete(id);
      for (const [id] of iteration.entries) this.place(id);
      this.iterations.push({ ...iteration, rows: iteration.entries.map(([id, tokens]) => ({ id, tokens, row: this.lanes.get(id), number: this.numbers.get(id) })) });
      this.last = Math.max(this.last, iteration.index);
    }
    this.iterations.splice(0, Math.max(0, this.iterations.length - COLUMNS));
    for (const request of state.requests) this.number(request.id);
    this.release(alive);
    this.samples.push({ at: state.now, tokens: state.stats.generated_tokens });
    while (this.samples.length > 2 && this.samples[1].at < state.now - RATE_WINDOW) this.samples.shift();
  }

  number(id) {
    if (!this.numbers.has(id)) this.numbers.set(id, this.seen++);
    return this.numbers.get(id);
  }

  place(id) {
    this.number(id);
    if (this.lanes.has(id)) return;
    const taken = new Set(this.lanes.values());
    let row = 0;
    while (taken.has(row)) row += 1;
    this.lanes.set(id, row);
  }

  release(alive) {
    for (const id of this.lanes.keys()) if (!alive.has(id)) this.lanes.delete(id);
    const shown = new Set(this.iterations.flatMap((iteration) => iteration.entries.map(([id]) => id)));
    for (const known of [this.numbers, this.until]) for (const id of known.keys()) if (!alive.has(id) && !shown.has(id)) known.delete(id);
  }

  get rows() {
    let most = 0;
    for (const iteration of this.iterations) for (const cell of iteration.rows) most = Math.max(most, cell.row + 1);
    return most;
  }

  /** Generated tokens a second over the last two seconds; null after one look. */
  get rate() {
    const [first, last] = [this.samples[0], this.samples.at(-1)];
    return first && last.at > first.at ? (last.tokens - first.tokens) / ((last.at - first.at) / 1e9) : null;
  }

  /** Mean duration in ms of the last 16 iterations. */
  get step() {
    const recent = this.iterations.slice(-16);
    return recent.length ? recent.reduce((sum, iteration) => sum + (iteration.end - iteration.start), 0) / recent.length / 1e6 : null;
  }
}
