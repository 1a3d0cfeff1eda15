// The page: choose or upload a medium, ask about it, follow the answer's times. Text from anywhere reaches the page as
// text nodes alone. The API key stays in this module's memory.

const byId = (id) => document.getElementById(id);
const player = byId("player");
const MAX_STRIP = 12; // thumbnails
const MAX_TICKS = 512;
const PAGE_SIZE = 50; // videos
const SEEK_TIMEOUT_MS = 4000;
const MAX_FETCHED = 256 * 2 ** 20; // bytes of a file that the page may hold in memory
const UNREADABLE = "The server may not read this medium's file, so there is no picture. Questions work.";
const TOO_LARGE = "This file is too large to be loaded with a key, so there is no picture. Questions work.";

let key = "";
let model = "";
let lastId = "";
let medium = null; // {url, kind, name, duration, frames: seconds of the frames that a question sees}
let messages = [];
let running = null; // AbortController of the question being answered
let listing = 0; // number of the latest list
let strip = 0; // number of the latest strip; older ones stop drawing

// ---- server

function address(path) {
  return new URL(path, document.baseURI);
}

function authorization() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options = {}) {
  const response = await fetch(address(path), { ...options, headers: { ...authorization(), ...options.headers } });
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not in the API's form */ }
  if (response.status === 401) byId("key").focus();
  return new Error(message);
}

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

async function attempt(action) {
  try {
    await action();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}

// ---- library

async function start() {
  const models = await (await call("v1/models")).json();
  model = models.data[0].id;
  byId("model").textContent = model;
  await list();
}

async function list(isMore = false) {
  const query = new URLSearchParams({ limit: PAGE_SIZE, prefix: byId("prefix").value, after: isMore ? lastId : "" });
  const number = ++listing;
  const page = await (await call(`v1/videos?${query}`)).json();
  if (number !== listing) return;
  const items = page.data.map((video) => {
    const button = element("button", video.id, { type: "button" });
    button.dataset.id = video.id;
    const facts = video.modality === "video" ? `${seconds(video.duration_seconds)}, ${video.num_frames} frames` : "picture";
    button.append(element("small", facts));
    button.addEventListener("click", () => attempt(() => chooseStored(video.id)));
    const item = element("li");
    item.append(button);
    return item;
  });
  if (isMore) byId("videos").append(...items);
  else byId("videos").replaceChildren(...items);
  lastId = page.last_id ?? lastId;
  byId("more").hidden = !page.has_more;
  say(page.data.length || isMore ? "" : "No stored video has such an id.");
}

async function chooseStored(id) {
  const path = `v1/videos/${id.split("/").map(encodeURIComponent).join("/")}`;
  const video = await (await call(path)).json();
  const frames = video.selected_frames.map((index) => video.frame_seconds[index]);
  const facts = `${seconds(video.duration_seconds)}, ${video.num_frames} frames stored, ${frames.length} seen by a question`;
  let source = null;
  let reason = UNREADABLE;
  try {
    const first = await call(`${path}/content`, { headers: { Range: "bytes=0-0" } });
    // a player sends no key, so with one the file is fetched here
    if (!key) source = address(`${path}/content`).href;
    else if (Number(first.headers.get("Content-Range")?.split("/")[1]) > MAX_FETCHED) reason = TOO_LARGE;
    else source = URL.createObjectURL(await (await call(`${path}/content`)).blob());
  } catch { /* times and answers are there all the same */ }
  const chosen = { url: video.url, kind: video.modality, name: id, duration: video.duration_seconds, frames };
  await show(chosen, source, facts, reason);
  for (const button of document.querySelectorAll("#videos button")) {
    button.setAttribute("aria-current", String(button.dataset.id === id));
  }
}

function upload(file) {
  const bar = byId("upload");
  const form = new FormData();
  form.append("purpose", "vision");
  form.append("file", file);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch tells no progress of an upload
    request.open("POST", address("v1/files"));
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => { bar.value = event.loaded / event.total; });
    request.addEventListener("error", () => reject(new Error("the upload failed: the server cannot be reached")));
    request.addEventListener("load", async () => {
      if (request.status === 200) resolve(JSON.parse(request.responseText));
      else reject(await failure(new Response(request.responseText, { status: request.status })));
    });
    request.addEventListener("loadend", () => { bar.hidden = true; });
    bar.value = 0;
    bar.hidden = false;
    request.send(form);
  });
}

async function chooseFile(file) {
  say(`Uploading ${file.name}`);
  const stored = await upload(file);
  const kind = file.type.startsWith("image/") ? "image" : "video";
  const chosen = { url: stored.id, kind, name: stored.filename, duration: 0, frames: [] };
  await show(chosen, URL.createObjectURL(file), `${(stored.bytes / 1e6).toFixed(1)} MB uploaded`);
}

// ---- medium

async function show(chosen, source, facts, reason = UNREADABLE) {
  if (player.src.startsWith("blob:")) URL.revokeObjectURL(player.src);
  medium = chosen;
  newConversation();
  say("");
  byId("medium-title").textContent = chosen.name;
  byId("facts").textContent = facts;
  const isVideo = chosen.kind === "video";
  player.hidden = !(source && isVideo);
  byId("still").hidden = !(source && !isVideo);
  byId("no-picture").hidden = Boolean(source);
  byId("no-picture").textContent = reason;
  player.removeAttribute("src");
  if (source && isVideo) player.src = source;
  else if (source) byId("still").src = source;
  if (source && isVideo && !chosen.duration) {
    await once(player, "loadedmetadata", SEEK_TIMEOUT_MS);
    chosen.duration = Number.isFinite(player.duration) ? player.duration : 0;
  }
  byId("timeline").hidden = !isVideo || !chosen.duration;
  if (!byId("timeline").hidden) await drawTimeline(source);
}

async function drawTimeline(source) {
  const { duration, frames } = medium;
  const number = ++strip;
  byId("seek").max = duration;
  byId("end").textContent = seconds(duration);
  moveTo(0);
  const ticks = evenly(frames, MAX_TICKS).map((time) => {
    const tick = element("i");
    tick.style.left = percent(time);
    return tick;
  });
  byId("ticks").replaceChildren(...ticks);
  const count = Math.min(MAX_STRIP, Math.max(1, Math.floor(duration)));
  const times = frames.length ? evenly(frames, MAX_STRIP) : Array.from({ length: count }, (_, i) => (i * duration) / count);
  const buttons = times.map((time) => {
    const button = element("button", "", { type: "button" });
    const label = element("span", seconds(time));
    button.append(label);
    button.addEventListener("click", () => moveTo(Number(button.dataset.seconds)));
    button.dataset.seconds = time;
    return button;
  });
  byId("frames").replaceChildren(...buttons.map((button) => {
    const item = element("li");
    item.append(button);
    return item;
  }));
  if (source) void drawStrip(source, buttons, number);
}

async function drawStrip(source, buttons, number) {
  const video = element("video", "", { muted: "", preload: "auto" });
  video.src = source;
  if (!await once(video, "loadeddata", SEEK_TIMEOUT_MS)) return;
  for (const button of buttons) {
    if (number !== strip) return;
    const wanted = Number(button.dataset.seconds);
    const shown = frameTime(video);
    video.currentTime = wanted;
    if (!await once(video, "seeked", SEEK_TIMEOUT_MS)) return;
    if (number !== strip) return;
    const canvas = element("canvas", "", { "aria-hidden": "true" });
    canvas.width = 160;
    canvas.height = Math.round((160 * video.videoHeight) / Math.max(1, video.videoWidth)) || 90;
    canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
    button.prepend(canvas);
    if (medium.frames.length) continue; // the server has said the frames' own times
    const time = await shown;
    if (time !== null) {
      button.dataset.seconds = time;
      button.lastChild.textContent = seconds(time);
    }
  }
}

// Resolves to the timestamp of the next frame that is shown, null where the browser does not tell it.
function frameTime(video) {
  if (!video.requestVideoFrameCallback) return Promise.resolve(null);
  return new Promise((resolve) => {
    setTimeout(() => resolve(null), 500);
    video.requestVideoFrameCallback((_, frame) => resolve(frame.mediaTime));
  });
}

function moveTo(time) {
  byId("seek").value = time;
  byId("now").textContent = seconds(time);
  byId("seek").setAttribute("aria-valuetext", `${time.toFixed(1)} seconds`);
  if (!player.hidden && Math.abs(player.currentTime - time) > 0.01) player.currentTime = time;
}

function drawSpans(spans) {
  byId("spans").replaceChildren(...spans.map((span) => {
    const text = `${span.start} to ${span.end} seconds`;
    const button = element("button", "", { type: "button", "aria-label": text, title: span.label || text });
    button.style.left = percent(span.start);
    button.style.width = `${(100 * Math.max(0, Math.min(span.end, medium.duration) - span.start)) / medium.duration}%`;
    button.addEventListener("click", () => moveTo(span.start));
    return button;
  }));
}

// ---- conversation

function newConversation() {
  running?.abort();
  messages = [];
  byId("log").replaceChildren();
  byId("spans").replaceChildren();
}

async function ask(question) {
  const kind = `${medium.kind}_url`;
  const part = { type: "text", text: question };
  const isFirst = messages.length === 0;
  messages.push({ role: "user", content: isFirst ? [{ type: kind, [kind]: { url: medium.url } }, part] : question });
  article("user").textContent = question;
  const place = article("assistant");
  place.setAttribute("aria-busy", "true");
  const answer = { text: "", usage: null };
  const controller = new AbortController();
  running = controller;
  busy(true);
  const began = performance.now();
  let first = null;
  let problem = "";
  try {
    const body = { model, messages, stream: true, stream_options: { include_usage: true } };
    const options = { method: "POST", body: JSON.stringify(body), signal: controller.signal };
    const response = await call("v1/chat/completions", { ...options, headers: { "Content-Type": "application/json" } });
    for await (const event of eventsOf(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const text = event.choices?.[0]?.delta?.content ?? "";
      if (text && first === null) first = performance.now();
      answer.text += text;
      answer.usage = event.usage ?? answer.usage;
      place.textContent = answer.text;
      byId("log").scrollTop = byId("log").scrollHeight;
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    if (running === controller) running = null;
    busy(false);
    place.removeAttribute("aria-busy");
  }
  if (!place.isConnected) return; // another conversation has begun
  finish(place, answer, { began, first, ended: performance.now(), problem });
  if (problem && !answer.text) messages.pop();
  else messages.push({ role: "assistant", content: answer.text });
}

function finish(place, answer, { began, first, ended, problem }) {
  const spans = spansOf(answer.text);
  place.replaceChildren(...withButtons(answer.text, spans));
  if (spans.length && medium.duration) drawSpans(spans);
  if (problem) place.append(element("span", problem, { class: "facts error" }));
  const facts = [];
  if (first !== null) facts.push(`first token after ${((first - began) / 1000).toFixed(2)} s`);
  if (answer.usage) {
    const { prompt_tokens: prompt, completion_tokens: tokens, prompt_tokens_details: details } = answer.usage;
    facts.push(`${details.cached_tokens} of ${prompt} prompt tokens cached`);
    const elapsed = (ended - first) / 1000;
    if (tokens > 1 && elapsed > 0) facts.push(`${tokens} tokens, ${((tokens - 1) / elapsed).toFixed(1)} a second`);
  }
  if (facts.length) place.append(element("span", facts.join(" · "), { class: "facts" }));
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment, while the first token takes long
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
  throw new Error("the connection ended before the answer did");
}

function busy(isBusy) {
  byId("send").disabled = isBusy;
  byId("stop").hidden = !isBusy;
}

// ---- times in answers

const CLOCK = String.raw`\d{1,2}(?::\d{2}){1,2}(?:\.\d+)?`;
const NUMBER = String.raw`\d+(?:\.\d+)?`;
const TO = String.raw`\s*(?:-|–|—|to|until|and)\s*`;
const UNIT = String.raw`\s*(?:seconds?|secs?|s)\b`;
const SPAN = new RegExp(`(${CLOCK})${TO}(${CLOCK})|(${NUMBER})(?:${UNIT})?${TO}(${NUMBER})${UNIT}`, "gi");

// Spans in an answer: JSON with segments, or times such as "15 to 21 seconds" and "1:05 - 1:20", with their places.
export function spansOf(text) {
  try {
    const { segments } = JSON.parse(text);
    return segments.map((one) => ({ start: one.start_seconds, end: one.end_seconds, label: one.label }))
      .filter((span) => Number.isFinite(span.start) && span.start <= span.end);
  } catch { /* plain text */ }
  return [...text.matchAll(SPAN)].map((found) => ({
    start: inSeconds(found[1] ?? found[3]),
    end: inSeconds(found[2] ?? found[4]),
    at: found.index,
    text: found[0],
  })).filter((span) => span.start <= span.end);
}

function inSeconds(text) {
  return text.split(":").reduce((sum, part) => 60 * sum + Number(part), 0);
}

function withButtons(text, spans) {
  const nodes = [];
  let end = 0;
  for (const span of spans) {
    if (span.at === undefined) continue;
    const button = element("button", span.text, { type: "button" });
    button.addEventListener("click", () => moveTo(span.start));
    nodes.push(text.slice(end, span.at), button);
    end = span.at + span.text.length;
  }
  return [...nodes, text.slice(end)];
}

// ---- small things

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function article(role) {
  const made = element("article", "", { class: role, "aria-label": role === "user" ? "Question" : "Answer" });
  byId("log").append(made);
  byId("log").scrollTop = byId("log").scrollHeight;
  return made;
}

function once(target, event, timeoutMs) {
  return new Promise((resolve) => {
    const timer = setTimeout(() => resolve(false), timeoutMs);
    target.addEventListener(event, () => { clearTimeout(timer); resolve(true); }, { once: true });
  });
}

function evenly(values, count) {
  if (values.length <= count) return values;
  return Array.from({ length: count }, (_, index) => values[Math.round((index * (values.length - 1)) / (count - 1))]);
}

function seconds(value) {
  return `${value.toFixed(1)} s`;
}

function percent(time) {
  return `${Math.min(100, (100 * time) / medium.duration)}%`;
}

// ---- events

byId("key").addEventListener("change", (event) => {
  key = event.target.value.trim();
  attempt(start);
});
byId("connect").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("key").blur(); // which is a change
});
byId("prefix").addEventListener("input", () => attempt(list));
byId("more").addEventListener("click", () => attempt(() => list(true)));
byId("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) attempt(() => chooseFile(file));
  event.target.value = "";
});
byId("drop").addEventListener("dragover", () => byId("drop").classList.add("over"));
byId("drop").addEventListener("dragleave", () => byId("drop").classList.remove("over"));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) attempt(() => chooseFile(file));
});
byId("seek").addEventListener("input", (event) => moveTo(Number(event.target.value)));
player.addEventListener("timeupdate", () => moveTo(player.currentTime));
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question) return;
  if (!medium) return say("Choose a video first.", true);
  if (running) return say("The last question is still being answered; stop it first.", true);
  say("");
  byId("question").value = "";
  attempt(() => ask(question));
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", newConversation);
attempt(start);
