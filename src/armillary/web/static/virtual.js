// An engine in virtual time as a source for the view of live.js: play, pause, speed, any instant.

import { getJson, post, remove } from "./api.js";
import { afresh, wake } from "./live.js";

const $ = (id) => document.getElementById(id);
const [player, play, time, clock, speed, replica] = ["player", "player-play", "player-time", "player-clock", "player-speed", "player-replica"].map($);
const SPEEDS = [0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 100];
const PLAYING_MS = 120;

let watched = null; // the simulation that the player's controls are about

/** The run of `body`, whose last request ends at `makespan` ns on `replicas` replicas. Does nothing before it is asked for its state. */
export class Virtual {
  constructor(body, makespan, replicas) {
    Object.assign(this, { body, makespan, replicas, at: 0, speed: 1, replica: 0, playing: false, id: null, begun: null, dirty: true, since: null });
  }

  /** Its process here ends, too. */
  close() {
    this.pause();
    if (this.id) remove(`/simulate/watch/${this.id}`).catch(() => {});
    this.id = this.begun = null;
  }

  async state(since, signal) {
    this.advance();
    if (!this.dirty && !this.playing) return null;
    this.dirty = false;
    const at = Math.round(this.at);
    const state = await this.asked(`?at=${at}&since=${since}`, signal);
    if (this.playing && at >= this.makespan) this.pause();
    return state;
  }

  async story(id) {
    const { requests } = await this.asked(`/requests/${encodeURIComponent(id)}?at=${Math.round(this.at)}`);
    return requests[0].events;
  }

  wait() {
    return this.playing ? PLAYING_MS : 400;
  }

  named() {}

  /** Begins the simulation when it is not there (any more): the same seed is the same run. */
  async asked(rest, signal) {
    for (let again = false; ; again = true) {
      this.begun ??= post("/simulate/watch", { ...this.body, ...(this.replica ? { replica: this.replica } : {}) }).then((answer) => answer.json());
      try {
        this.id = (await this.begun).id;
        return await getJson(`/simulate/watch/${this.id}${rest}`, signal);
      } catch (error) {
        this.id = this.begun = null;
        if (again || error.status !== 404 || rest.startsWith("/requests")) {
          this.pause();
          if (!rest.startsWith("/requests")) {
            $("engine-none").textContent = error.message;
            $("engine").classList.add("empty");
          }
          throw error;
        }
      }
    }
  }

  advance() {
    const now = performance.now();
    if (this.playing) this.at = Math.min(this.makespan, this.at + (now - this.since) * 1e6 * this.speed);
    this.since = now;
    show();
  }

  play() {
    if (this.at >= this.makespan) this.seek(0);
    this.playing = true;
    this.since = performance.now();
    show();
    wake();
  }

  pause() {
    this.playing = false;
    show();
  }

  seek(at) {
    this.at = Math.max(0, Math.min(this.makespan, at));
    this.dirty = true;
    show();
    afresh();
  }

  of(index) {
    this.close();
    this.replica = index;
    this.seek(this.at);
  }
}

/** The controls are about `source`, or hidden. */
export function control(source) {
  watched = source;
  player.hidden = source === null;
  if (source === null) return;
  time.max = source.makespan;
  time.step = Math.max(1, Math.floor(source.makespan / 2000));
  speed.value = source.speed;
  $("player-replicas").hidden = source.replicas < 2;
  replica.max = source.replicas - 1;
  replica.value = source.replica;
  show();
}

function show() {
  if (watched === null) return;
  const sign = watched.playing ? "❚❚" : "▶";
  if (play.textContent !== sign) play.textContent = sign;
  play.setAttribute("aria-label", watched.playing ? "Pause" : "Play");
  time.value = watched.at;
  const digits = watched.makespan < 1e10 ? 3 : 1;
  clock.textContent = `${(watched.at / 1e9).toFixed(digits)} of ${(watched.makespan / 1e9).toFixed(digits)} s`;
}

speed.append(...SPEEDS.map((value) => {
  const option = document.createElement("option");
  option.value = value;
  option.textContent = `${value}×`;
  return option;
}));
play.addEventListener("click", () => (watched.playing ? watched.pause() : watched.play()));
time.addEventListener("input", () => watched.seek(Number(time.value)));
speed.addEventListener("change", () => {
  watched.advance();
  watched.speed = Number(speed.value);
});
replica.addEventListener("change", () => {
  if (replica.value !== "" && replica.checkValidity()) watched.of(Number(replica.value));
});
