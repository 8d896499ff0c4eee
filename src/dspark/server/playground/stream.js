// One streamed request: what is asked, and the pieces of the answer as they come.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** What is sent for `settings`; `speculate` false is plain decoding. */
export function body(settings, speculate) {
  const shared = {
    temperature: settings.temperature,
    seed: settings.seed,
    stream: true,
    dspark: speculate ? { trace: true } : { trace: true, speculation: "off" },
  };
  return settings.chat
    ? { ...shared, messages: [{ role: "user", content: settings.prompt }], max_completion_tokens: settings.tokens }
    : { ...shared, prompt: settings.prompt, max_tokens: settings.tokens };
}

export function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Calls `take(choice)` for every piece. Throws Refused for an error of the server's, AbortError when stopped. */
export async function stream(settings, { speculate, key, signal, take }) {
  const answer = await fetch(settings.chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(body(settings, speculate)),
    signal,
  });
  if (!answer.ok) throw await refusal(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, "the connection broke before the text was whole; run it again");
    const events = (unread + value).split("\n\n");
    unread = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new Refused(0, told.error.message);
      if (told.choices.length) take(told.choices[0]);
    }
  }
}

export async function refusal(answer) {
  let message = `the server answered ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not ours: a proxy's own page, which is not worth showing
  }
  return new Refused(answer.status, message);
}
