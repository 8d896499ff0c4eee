// The server's load, second by second, from its own /metrics; and other texts that make some, if they are asked for.

import { stream } from "./stream.js";

const SECONDS = 60;
const PREFIX = "dspark_";

/** Prometheus' text as {name: value}; series with labels are left out. */
export function parse(text) {
  const lines = text.split("\n").filter((line) => line.startsWith(PREFIX) && !line.includes("{"));
  return Object.fromEntries(
    lines.map((line) => line.slice(PREFIX.length).split(" ")).map(([name, value]) => [name, Number(value)]),
  );
}

export class LoadPanel {
  constructor(find) {
    this.find = find;
    this.speeds = [];
    this.before = null;
    this.watch();
  }

  async watch() {
    for (;;) {
      if (!document.hidden) await this.read();
      await new Promise((resume) => setTimeout(resume, 1000));
    }
  }

  async read() {
    try {
      const answer = await fetch("/metrics");
      if (answer.ok) this.show(parse(await answer.text()), performance.now() / 1000);
    } catch {
      this.before = null;
      this.find("scale").textContent = "The server does not answer.";
    }
  }

  show(now, seconds) {
    const set = (id, value) => (this.find(id).textContent = value);
    set("running", now.num_requests_running ?? "–");
    set("waiting", now.num_requests_waiting ?? "–");
    set("pages", percent(now.kv_cache_usage_perc));
    set("notice", notice(now));
    const before = this.before;
    this.before = { ...now, seconds };
    if (!before) return;
    const grown = (name) => (now[`${name}_total`] ?? 0) - (before[`${name}_total`] ?? 0);
    const steps = grown("engine_steps");
    const [checked, drafted] = [grown("spec_decode_num_verified_tokens"), grown("spec_decode_num_draft_tokens")];
    set("budget", steps > 0 ? (checked / steps).toFixed(1) : "–");
    set("share", drafted > 0 ? percent(checked / drafted) : "–");
    const speed = Math.max(0, grown("generation_tokens") / (seconds - before.seconds));
    set("throughput", speed.toFixed(0));
    this.speeds = [...this.speeds, speed].slice(-SECONDS);
    this.draw();
  }

  draw() {
    const most = Math.max(1, ...this.speeds);
    const first = SECONDS - this.speeds.length;
    const points = this.speeds.map((speed, k) => `${((first + k) * 600) / (SECONDS - 1)},${78 - (72 * speed) / most}`);
    this.find("line").setAttribute("points", points.join(" "));
    this.find("area").setAttribute("points", `${(first * 600) / (SECONDS - 1)},80 ${points.join(" ")} 600,80`);
    this.find("scale").textContent = `Tokens per second of all texts in the last minute, at most ${most.toFixed(0)}.`;
  }
}

function notice(now) {
  if (now.engine_forwards_compiling > 0) return "The server is still compiling its forwards: times will get better.";
  if (now.spec_decode_resting > 0) return "The planner lets nobody draft now: it would not pay.";
  if (now.spec_decode_speedup) {
    return `By the planner's prices, speculation has made this server ${now.spec_decode_speedup.toFixed(2)} times as fast.`;
  }
  return "\u00a0";
}

function percent(share) {
  return share === undefined ? "–" : `${Math.round(100 * share)} %`;
}

/** Keeps a number of texts being written beside the ones on show. */
export class Others {
  constructor() {
    this.stops = [];
  }

  /** Make it `count` texts of `settings()`, each with a seed of its own; `failed(error)` when one is refused. */
  keep(count, settings, key, failed) {
    while (this.stops.length > count) this.stops.pop().abort();
    while (this.stops.length < count) {
      const stop = new AbortController();
      this.stops.push(stop);
      this.write(stop, settings, key, failed);
    }
  }

  async write(stop, settings, key, failed) {
    try {
      while (!stop.signal.aborted) {
        const seed = Math.floor(Math.random() * 2 ** 32);
        await stream({ ...settings(), seed }, { speculate: true, key: key(), signal: stop.signal, take: () => {} });
      }
    } catch (error) {
      if (stop.signal.aborted) return;
      this.stops = this.stops.filter((one) => one !== stop);
      failed(error);
    }
  }
}
