// One text as it is written: its tokens in their colours, its speed, and what the server says of it at the end.

const KINDS = new Set(["accepted", "corrected", "bonus", "plain"]);

export class Column {
  constructor(section, tip) {
    this.text = section.querySelector("pre");
    this.speedShown = section.querySelector(".speed b");
    this.factsShown = section.querySelector(".facts");
    this.tip = tip;
    this.text.addEventListener("pointerover", (event) => this.point(event.target));
    this.text.addEventListener("pointerleave", () => this.point(null));
    this.text.addEventListener("keydown", (event) => this.walk(event));
    this.text.addEventListener("blur", () => this.point(null));
    this.text.addEventListener("scroll", () => this.point(null));
    this.begin("");
  }

  begin(prompt, facts = "\u00a0") {
    this.ids = [];
    this.notes = new Map();
    this.current = null;
    this.pieces = 0;
    this.firstAt = this.firstCount = this.now = NaN;
    this.statistics = null;
    this.started = performance.now();
    const before = document.createElement("span");
    before.className = "faint";
    before.textContent = prompt;
    this.text.replaceChildren(before);
    this.say(facts);
    this.speedShown.textContent = "–";
  }

  say(facts) {
    this.factsShown.textContent = facts;
  }

  take(choice) {
    const told = choice.dspark;
    if (!told) return; // the start of a chat's turn
    const tokens = told.tokens ?? [];
    if (tokens.length) {
      this.now = performance.now();
      if (!this.pieces) [this.firstAt, this.firstCount] = [this.now, tokens.length];
      this.pieces += 1;
    }
    const follow = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    this.text.append(...tokens.map((token) => this.span(token)));
    if (follow) this.text.scrollTop = this.text.scrollHeight;
    if (choice.finish_reason) this.statistics = told;
    this.speedShown.textContent = this.speed ? this.speed.toFixed(0) : "–";
    const first = this.statistics ? 1000 * told.first_token_seconds : this.firstAt - this.started;
    this.say(`${this.ids.length} tokens in ${this.rounds} rounds, the first after ${first.toFixed(0)} ms`);
  }

  span(token) {
    const span = document.createElement("span");
    span.className = KINDS.has(token.kind) ? token.kind : "plain";
    span.textContent = token.text;
    if (token.kind === "accepted") span.style.setProperty("--sure", (0.1 + 0.5 * token.confidence).toFixed(2));
    this.ids.push(token.id);
    this.notes.set(span, note(token));
    return span;
  }

  get done() {
    return this.statistics !== null;
  }

  get rounds() {
    return this.statistics ? this.statistics.rounds : Math.max(0, this.pieces - 1);
  }

  /** Tokens per second after the first commit: by the page's clock while it runs, by the engine's when it is done. */
  get speed() {
    const tokens = this.ids.length - this.firstCount;
    const told = this.statistics;
    const seconds = told ? told.seconds - told.first_token_seconds : (this.now - this.firstAt) / 1000;
    return tokens > 0 && seconds > 0 ? tokens / seconds : null;
  }

  get tau() {
    if (this.statistics) return this.statistics.tokens_per_round || null;
    return this.rounds > 0 ? (this.ids.length - this.firstCount) / this.rounds : null;
  }

  /** Outline token `place`, where two texts part. */
  mark(place) {
    this.text.children[place + 1]?.classList.add("differs");
  }

  point(span) {
    this.current?.classList.remove("current");
    const note = this.notes.get(span);
    this.current = note ? span : null;
    this.tip.hidden = !note;
    if (!note) return;
    span.classList.add("current");
    this.tip.textContent = note;
    this.tip.style.left = "0"; // its width depends on the room to its right: measure it where there is most
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const room = document.documentElement.clientWidth - this.tip.offsetWidth - 8;
    const below = at.bottom + 8 + this.tip.offsetHeight < innerHeight;
    this.tip.style.left = `${Math.max(8, Math.min(at.left, room))}px`;
    this.tip.style.top = `${below ? at.bottom + 6 : at.top - this.tip.offsetHeight - 6}px`;
  }

  walk(event) {
    const spans = [...this.notes.keys()];
    const place = spans.indexOf(this.current);
    const next = { ArrowRight: place + 1, ArrowLeft: place < 0 ? spans.length - 1 : place - 1, Home: 0, End: spans.length - 1 }[event.key];
    const span = spans[next];
    if (event.ctrlKey || event.metaKey || event.altKey || !span) return;
    event.preventDefault();
    span.scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => this.point(span)); // scrolling hides the note: show it after
  }
}

function note(token) {
  const sure = token.confidence === undefined ? "" : `, confidence ${Math.round(100 * token.confidence)} %`;
  const shown = JSON.stringify(token.text);
  switch (token.kind) {
    case "accepted":
      return `${shown}: draft place ${token.slot}${sure}, accepted`;
    case "corrected":
      return `${shown}: the target's own, in place of the draft ${JSON.stringify(token.rejected)} (place ${token.slot}${sure})`;
    case "bonus":
      return `${shown}: the target's own, after a draft that stood to its end`;
    default:
      return `${shown}: the target's own, no draft was checked`;
  }
}

/** The first place where two lists of token ids part; null where one begins with the other. */
export function parting(ids, others) {
  const common = Math.min(ids.length, others.length);
  for (let place = 0; place < common; place += 1) if (ids[place] !== others[place]) return place;
  return null;
}
