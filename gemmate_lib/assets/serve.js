"use strict";
// What a model wrote is put in by textContent alone: it is never read as HTML.
const by = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const aware = new Map(); // a model's name -> whether it reads the time
let key = null; // a bearer key lives here and nowhere else
let running = null; // what stops the answers that are being written

class Refused extends Error {} // its message is for people

function headers() {
  const found = { "Content-Type": "application/json" };
  if (key !== null) found.Authorization = `Bearer ${key}`;
  return found;
}

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(), credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running, and the network up?");
  }
  if (response.ok) return response;
  throw new Refused(await reason(response));
}

async function reason(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? (typeof body.detail === "string" ? body.detail : "");
  } catch {
    // not JSON: the status must do
  }
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const again = Number.isFinite(wait) ? `Try again in ${wait} s.` : "Try again in a moment.";
  if (response.status === 401) {
    by("key-form").hidden = false;
    by("key").focus();
    return key === null ? "This server asks for a key." : "The server did not accept this key.";
  }
  if (response.status === 404) load(); // it may have been removed while this page was open
  if (response.status === 429) return `The server has all the work it can take. ${again}`;
  if (response.status === 503) return `The server is starting or stopping. ${again}`;
  return said || `The server refused this (status ${response.status}).`;
}

function problem(text) {
  by("problem").textContent = text;
  by("problem").hidden = !text;
}

async function load() {
  try {
    const body = await (await asked("v1/models")).json();
    show(body.data);
    by("ask").hidden = by("answers").hidden = false;
    by("key-form").hidden = true;
    problem("");
    return true;
  } catch (error) {
    const wanted = key === null && !by("key-form").hidden; // the form says it already
    const said = error instanceof Refused ? error.message : "The list of models is unreadable.";
    problem(wanted ? "" : said);
    return false;
  }
}

function show(models) {
  aware.clear();
  for (const model of models) aware.set(model.id, model.time_aware === true);
  const names = [...aware.keys()];
  SIDES.forEach((side, at) => {
    const select = by(side);
    const before = select.value;
    select.replaceChildren(
      ...names.map((name) => new Option(aware.get(name) ? `${name} (reads the time)` : name, name)),
    );
    select.value = aware.has(before) ? before : names[Math.min(at, names.length - 1)] ?? "";
    select.disabled = names.length === 0;
  });
  chosen();
}

function chosen() {
  for (const side of SIDES) {
    by(`${side}-name`).textContent = by(side).value || `${side} answer`;
  }
  const readers = SIDES.filter((side) => aware.get(by(side).value));
  by("time").hidden = by("when-hint").hidden = readers.length === 0;
  const whose = readers.length === 2 ? "both models" : `the ${readers[0]} model`;
  by("when-hint").textContent =
    `The time is UTC, whatever the time zone of this computer, and goes to ${whose}. ` +
    "Empty: none is sent.";
}

function now() {
  by("when").valueAsNumber = Math.floor(Date.now() / 60_000) * 60_000;
}

// datetime-local knows no time zone, and valueAsNumber reads it as UTC: milliseconds since 1970.
function moment() {
  const value = by("when").valueAsNumber;
  return Number.isNaN(value) ? null : value;
}

async function* events(response) {
  const decoder = new TextDecoder();
  let held = "";
  for await (const bytes of parts(response.body.getReader())) {
    const blocks = (held + decoder.decode(bytes, { stream: true })).split(/\r?\n\r?\n/);
    held = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
  throw new Refused("The answer broke off: the server closed the connection.");
}

async function* parts(reader) {
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The answer broke off: the connection was lost.");
  } finally {
    reader.releaseLock();
  }
}

function note(side, text, failed = false) {
  by(`${side}-note`).textContent = text;
  by(`${side}-note`).classList.toggle("failed", failed);
}

async function answer(side, signal) {
  const model = by(side).value;
  const body = { model, prompt: by("prompt").value, max_tokens: by("tokens").valueAsNumber };
  const ask = { ...body, temperature: 0, stream: true };
  if (aware.get(model) && moment() !== null) ask.timestamp = moment();
  const text = by(`${side}-text`);
  by(`${side}-asked`).textContent = body.prompt;
  text.textContent = "";
  text.setAttribute("aria-busy", "true");
  note(side, "Waiting for the first words…");
  let end = null;
  try {
    const options = { method: "POST", body: JSON.stringify(ask), signal };
    for await (const event of events(await asked("v1/completions", options))) {
      if (event.error) throw new Refused(event.error.message);
      const choice = event.choices?.[0];
      if (choice?.text) {
        if (!text.hasChildNodes()) note(side, "Writing…");
        text.append(choice.text); // a text node
      }
      end = choice?.finish_reason ?? end;
    }
    note(side, end === "length" ? `Cut off after ${body.max_tokens} tokens.` : "Ended by itself.");
  } catch (error) {
    if (error.name === "AbortError") note(side, "Stopped.");
    else note(side, error instanceof Refused ? error.message : "The answer is unreadable.", true);
  } finally {
    text.setAttribute("aria-busy", "false");
  }
}

async function send(event) {
  event?.preventDefault();
  if (running || !by("ask").reportValidity() || by("left").disabled) return;
  running = new AbortController();
  problem("");
  by("send").setAttribute("aria-disabled", "true");
  by("stop").disabled = false;
  await Promise.all(SIDES.map((side) => answer(side, running.signal)));
  running = null;
  by("send").removeAttribute("aria-disabled");
  if (document.activeElement === by("stop")) by("send").focus(); // what is disabled loses it
  by("stop").disabled = true;
}

by("ask").addEventListener("submit", send);
by("stop").addEventListener("click", () => running?.abort());
by("now").addEventListener("click", now);
for (const side of SIDES) by(side).addEventListener("change", chosen);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event);
  if (event.key === "Escape") running?.abort();
});
by("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = by("key").value;
  by("key").value = "";
  if (await load()) by("prompt").focus();
});
now();
load();
