// The page: one prompt written twice, with speculation and without, and what came of it.

import { Column, parting } from "./column.js";
import { LoadPanel, Others } from "./load.js";
import { headers, refusal, stream } from "./stream.js";

const find = (id) => document.getElementById(id);
const KEY = "dspark-key";
const columns = { speculative: new Column(find("speculative"), find("tip")), ordinary: new Column(find("ordinary"), find("tip")) };
const others = new Others();
let running = null; // the AbortController of the present run

function settings() {
  return {
    prompt: find("prompt").value,
    temperature: Number(find("temperature").value),
    tokens: Number(find("tokens").value),
    seed: find("seed").value === "" ? Math.floor(Math.random() * 2 ** 32) : Number(find("seed").value),
    chat: find("format").value === "chat",
  };
}

function say(message) {
  find("status").textContent = message;
}

function fail(error) {
  find("error").textContent = error.status === 401 ? `${error.message}; or enter it under “API key”` : error.message;
  find("error").hidden = false;
  if (error.status === 401) {
    find("access").open = true;
    find("key").focus();
  }
}

async function write(name, asked, signal) {
  const column = columns[name];
  const speculate = name === "speculative";
  column.begin(asked.prompt, "working …");
  const take = (choice) => {
    column.take(choice);
    compare();
  };
  await stream(asked, { speculate, key: find("key").value, signal, take });
}

async function run() {
  if (running || !find("form").reportValidity()) return;
  const stop = (running = new AbortController());
  const asked = settings();
  find("error").hidden = true;
  find("run").disabled = true;
  find("stop").disabled = false;
  for (const column of Object.values(columns)) column.begin(asked.prompt, "waiting for its turn");
  compare();
  try {
    if (find("order").value === "together") {
      say(`Writing both, seed ${asked.seed} …`);
      await Promise.all(["speculative", "ordinary"].map((name) => write(name, asked, stop.signal)));
    } else {
      say(`Writing with speculation, seed ${asked.seed} …`);
      await write("speculative", asked, stop.signal);
      say(`Writing without, seed ${asked.seed} …`);
      await write("ordinary", asked, stop.signal);
    }
    say(finished(asked));
  } catch (error) {
    say(stop.signal.aborted ? "Stopped." : "");
    if (!stop.signal.aborted) fail(error);
    stop.abort(); // the other one need not go on
    for (const column of Object.values(columns)) if (!column.done) column.say(`${column.ids.length} tokens, stopped`);
  }
  running = null;
  find("run").disabled = false;
  find("stop").disabled = true;
}

function finished(asked) {
  const [fast, slow] = [columns.speculative.speed, columns.ordinary.speed];
  const ratio = fast && slow ? `${(fast / slow).toFixed(1)} times the speed` : "too short to time";
  return `Done: ${ratio}, same text: ${find("same").textContent}. Seed ${asked.seed}.`;
}

function compare() {
  const { speculative, ordinary } = columns;
  const ratio = speculative.speed && ordinary.speed ? speculative.speed / ordinary.speed : null;
  find("speedup").textContent = ratio ? `${ratio.toFixed(1)}×` : "–";
  find("tau").textContent = speculative.tau ? speculative.tau.toFixed(2) : "–";
  const told = speculative.statistics;
  find("stood").textContent = told?.verified ? `${Math.round((100 * told.accepted) / told.verified)} %` : "–";
  find("same").textContent = same(speculative, ordinary);
}

function same(one, other) {
  const place = parting(one.ids, other.ids);
  if (place !== null) {
    one.mark(place);
    other.mark(place);
    return `no, from token ${place + 1}`;
  }
  if (one.done && other.done) return one.ids.length === other.ids.length ? "yes" : "no, one is longer";
  return one.ids.length && other.ids.length ? "so far" : "–";
}

async function greet() {
  try {
    const answer = await fetch("/v1/models", { headers: headers(find("key").value) });
    if (!answer.ok) throw await refusal(answer);
    const model = (await answer.json()).data[0];
    find("model").textContent = `${model.id}, context of ${model.max_model_len} tokens`;
    find("error").hidden = true;
  } catch (error) {
    fail(error);
  }
}

function keepOthers() {
  const wanted = document.hidden || !find("others").reportValidity() ? 0 : Number(find("others").value);
  others.keep(wanted, settings, () => find("key").value, (error) => {
    find("others").value = others.stops.length;
    fail(error);
  });
}

find("key").value = sessionStorage.getItem(KEY) ?? "";
find("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, find("key").value);
  greet();
});
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
find("stop").addEventListener("click", () => running?.abort());
find("others").addEventListener("change", keepOthers);
document.addEventListener("visibilitychange", keepOthers);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  if (event.key === "Escape") running?.abort();
});
greet();
new LoadPanel(find);
