// The page: takes a recording, sends it to /transcribe, and shows each segment as soon as its line arrives.

import { Wave, doubt } from "./wave.js";

const RATE = 16000; // Hz of the samples that the browser decodes
const EDGE = 0.5; // seconds of audio sent before and after a segment for its attention
// The files that the service reads: always, and with PyAV. Others are sent as WAV if the browser can decode them.
const READABLE = /\.(wav|flac|ogg|oga|opus|mp3|aiff?|au|caf|w64)$/i;
const MEDIA = /\.(m4a|m4b|mp4|m4v|mov|3gp|aac|webm|mkv|mka)$/i;

const find = (id) => document.getElementById(id);
const audio = find("audio");
const wave = new Wave(find("wave"), { onWord: playWord, onSeek: seek });
let current = null; // the recording on the page: { name, samples, segments, done, abort }
let stopAt = Infinity; // seconds at which playing a word or segment ends
let hasPyav = false; // in the service
let frame = 0; // of the next call of follow while the recording plays

// ------------------------------------------------------------------------------------------------------- A recording

async function transcribe(blob, name) {
  current?.abort.abort();
  const recording = (current = { name, samples: null, segments: [], done: null, abort: new AbortController() });
  reset(blob, name);
  say("Reading the recording ...");
  try {
    recording.samples = await decode(blob).catch(() => null);
    if (recording !== current) return;
    recording.abort.signal.throwIfAborted();
    wave.set(recording.samples, RATE, (recording.samples?.length ?? 0) / RATE);
    const readable = READABLE.test(name) || (hasPyav && MEDIA.test(name)) || !recording.samples;
    await receive(readable ? blob : toWav(recording.samples), readable ? name : `${name}.wav`, recording);
  } catch (error) {
    if (recording === current && error.name !== "AbortError") fail(error.message);
  }
  if (recording === current) find("cancel").hidden = true;
}

function reset(blob, name) {
  stopAt = Infinity;
  URL.revokeObjectURL(audio.src);
  audio.src = URL.createObjectURL(blob);
  find("name").textContent = name;
  find("segments").replaceChildren();
  find("error").hidden = true;
  find("downloads").hidden = true;
  find("result").hidden = true;
  find("player").hidden = false;
  find("cancel").hidden = false;
  wave.set(null, RATE, 0);
}

async function receive(blob, name, recording) {
  const form = new FormData();
  form.append("file", blob, name);
  say("Sending the recording ...");
  const response = await fetch("transcribe", { method: "POST", body: form, signal: recording.abort.signal });
  if (!response.ok) throw new Error(await errorOf(response));
  say("Transcribing ...");
  for await (const row of lines(response.body)) {
    if (recording !== current) return;
    if (row.type === "segment") addSegment(row, recording);
    else if (row.type === "error") throw new Error(row.error.message);
    else finish(row, recording);
  }
  if (!recording.done) throw new Error("The connection ended early; try again.");
}

// The message of a response with an error, which may be that of a proxy.
async function errorOf(response) {
  const row = await response.json().catch(() => null);
  return row?.error?.message ?? `The server answered with status ${response.status}.`;
}

// The JSON objects of a response body, one per line.
async function* lines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
    if (done) return;
  }
}

function finish(row, recording) {
  recording.done = row;
  find("downloads").hidden = false;
  find("result").hidden = false;
  const words = recording.segments.flatMap((segment) => segment.shownWords).length;
  const done = row.text || !row.warnings.length ? [`Done: ${plural(words, "word")} in ${clock(row.duration)}.`] : [];
  say([...done, ...row.warnings.map((warning) => `Warning: ${warning}.`)].join("\n"));
}

function say(text) {
  find("status").textContent = text;
}

function fail(message) {
  say("");
  find("error").textContent = message;
  find("error").hidden = false;
}

// -------------------------------------------------------------------------------------------------------- A segment

function addSegment(segment, recording) {
  const whole = { word: segment.text, start: segment.start, end: segment.end, confidence: null };
  segment.shownWords = segment.words.length ? segment.words : segment.text ? [whole] : [];
  recording.segments.push(segment);
  const item = document.createElement("li");
  const time = element("button", clock(segment.start), { className: "time", type: "button" });
  time.setAttribute("aria-label", `Play from ${clock(segment.start)} to ${clock(segment.end)}`);
  time.addEventListener("click", () => play(segment.start, segment.end));
  item.append(time, ...segment.shownWords.map(wordButton), details(segment, recording));
  find("segments").append(item);
  find("result").hidden = false;
  wave.addWords(segment.shownWords);
  say(`Transcribing: ${clock(segment.end)} so far ...`);
  if (!document.querySelector(".word[tabindex='0']")) document.querySelector("button.word")?.setAttribute("tabindex", 0);
}

function wordButton(word) {
  const button = element("button", word.word, { className: "word", type: "button", tabIndex: -1 });
  if (word.confidence !== null) {
    const percent = Math.round(100 * word.confidence);
    button.style.setProperty("--share", doubt(word));
    button.classList.toggle("unsure", word.confidence < 0.5);
    button.title = `${word.start.toFixed(2)} s, confidence ${percent}%`;
    button.setAttribute("aria-label", `${word.word}, confidence ${percent}%`);
  }
  button.addEventListener("click", () => {
    focusWord(button);
    playWord(word);
  });
  word.button = button;
  return button;
}

function details(segment, recording) {
  const box = element("details");
  const others = segment.alternatives ?? [];
  box.append(element("summary", others.length ? `${plural(others.length, "other text")} and the attention` : "Attention"));
  const list = element("ul");
  for (const other of others) list.append(comparison(segment.text, other));
  box.append(list);
  box.addEventListener("toggle", () => {
    if (box.open && !box.querySelector("figure") && recording.samples) showAttention(box, segment, recording);
  });
  return box;
}

// A list item with another hypothesis; words that the best hypothesis lacks are marked.
function comparison(best, other) {
  const item = element("li");
  const kept = common(best.split(" "), other.text.split(" "));
  other.text.split(" ").forEach((word, i) => item.append(kept.has(i) ? word : element("mark", word), " "));
  item.append(`(log-probability ${other.score.toFixed(1)})`);
  return item;
}

// The indices in b of a longest common subsequence of the words a and b.
function common(a, b) {
  const length = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  const kept = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length; )
    if (a[i] === b[j]) kept.add((i++, j++));
    else if (length[i + 1][j] >= length[i][j + 1]) i++;
    else j++;
  return kept;
}

// ---------------------------------------------------------------------------------------------------------- Attention

async function showAttention(box, segment, recording) {
  const figure = element("figure");
  box.append(figure);
  figure.append("Computing the attention ...");
  const first = Math.max(0, Math.floor((segment.start - EDGE) * RATE));
  const form = new FormData();
  form.append("file", toWav(recording.samples.subarray(first, Math.ceil((segment.end + EDGE) * RATE))), "segment.wav");
  form.append("text", segment.text);
  try {
    const response = await fetch("attention", { method: "POST", body: form });
    if (!response.ok) throw new Error(await errorOf(response));
    const row = await response.json();
    const caption = "Attention: each row is a character of the text, each column a moment of the segment. " +
      "Bright: the audio the model attended to while writing the character.";
    figure.replaceChildren(picture(row), element("figcaption", caption));
  } catch (error) {
    figure.replaceChildren(`The attention could not be computed: ${error.message}`);
  }
}

// A canvas with the attention weights, the characters on the left and seconds below.
function picture(row) {
  const weights = Uint8Array.from(atob(row.weights), (c) => c.charCodeAt(0));
  const letters = [...row.text.replaceAll(" ", "\u2423"), "end"];
  const [cellHeight, cellWidth] = [11, Math.max(2, Math.min(6, Math.floor(560 / row.frames)))];
  const [left, bottom] = [26, 18];
  const [width, height] = [left + cellWidth * row.frames, cellHeight * letters.length + bottom];
  const canvas = element("canvas");
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  canvas.style.width = `${width}px`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Attention of ${letters.length} characters over ${row.frames} frames`);
  const pen = canvas.getContext("2d");
  pen.scale(devicePixelRatio, devicePixelRatio);
  pen.font = "10px ui-monospace, monospace";
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--soft");
  letters.forEach((letter, u) => {
    pen.fillStyle = ink;
    pen.fillText(letter, 2, cellHeight * (u + 1) - 2);
    for (let t = 0; t < row.frames; t++) {
      pen.fillStyle = heat(weights[u * row.frames + t] / 255);
      pen.fillRect(left + cellWidth * t, cellHeight * u, cellWidth + 0.5, cellHeight + 0.5);
    }
  });
  pen.fillStyle = ink;
  for (let s = 0; s < row.frame_seconds * row.frames; s++)
    pen.fillText(`${s} s`, left + (s / row.frame_seconds) * cellWidth, height - 5);
  return canvas;
}

// Matplotlib's colour map magma, at five points; colours between them are interpolated.
const MAGMA = [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]];

function heat(x) {
  const at = Math.min(3.999, 4 * x);
  const [low, high] = [MAGMA[Math.floor(at)], MAGMA[Math.floor(at) + 1]];
  return `rgb(${low.map((c, i) => Math.round(c + (high[i] - c) * (at % 1)))})`;
}

// --------------------------------------------------------------------------------------------------------------- Audio

function seek(time) {
  stopAt = Infinity;
  audio.currentTime = time;
}

function play(start, end) {
  stopAt = end;
  audio.currentTime = start;
  audio.play().catch((error) => {
    if (error.name !== "AbortError") fail("The browser cannot play this recording."); // AbortError: paused before it began
  });
}

function playWord(word) {
  play(Math.max(0, word.start - 0.05), word.end + 0.05);
}

function follow() {
  if (audio.currentTime >= stopAt) audio.pause();
  wave.setTime(audio.currentTime, !audio.paused);
  for (const segment of current?.segments ?? [])
    for (const word of segment.shownWords)
      word.button.classList.toggle("now", word.start <= audio.currentTime && audio.currentTime < word.end);
  cancelAnimationFrame(frame);
  if (!audio.paused) frame = requestAnimationFrame(follow);
}

audio.addEventListener("play", follow);
audio.addEventListener("seeked", follow);
audio.addEventListener("pause", () => (stopAt = Infinity));

// The samples of a recording: one channel at RATE.
async function decode(blob) {
  const buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
  if (buffer.numberOfChannels === 1) return buffer.getChannelData(0);
  const mixed = new Float32Array(buffer.length);
  for (let c = 0; c < buffer.numberOfChannels; c++)
    buffer.getChannelData(c).forEach((x, i) => (mixed[i] += x / buffer.numberOfChannels));
  return mixed;
}

// A WAV file of 16 bits.
function toWav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.min(1, Math.max(-1, x))), true));
  return new Blob([view], { type: "audio/wav" });
}

// ------------------------------------------------------------------------------------------------------------ Controls

let recorder = null;

async function record() {
  if (recorder) {
    recorder.stop();
    return;
  }
  let stream;
  find("record").disabled = true; // the browser may be asking for permission
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    fail(navigator.mediaDevices ? `The microphone cannot be used: ${error.message}.`
      : "Browsers allow the microphone only on localhost or over https.");
    return;
  } finally {
    find("record").disabled = false;
  }
  const parts = [];
  const began = performance.now();
  recorder = new MediaRecorder(stream);
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const timer = setInterval(() => say(`Recording: ${clock((performance.now() - began) / 1000)}`), 500);
  recorder.addEventListener("stop", () => {
    clearInterval(timer);
    for (const track of stream.getTracks()) track.stop();
    const type = recorder.mimeType;
    recorder = null;
    showRecording(false);
    transcribe(new Blob(parts, { type }), `recording ${new Date().toLocaleTimeString()}`);
  });
  recorder.start();
  showRecording(true);
}

function showRecording(isRecording) {
  find("record").setAttribute("aria-pressed", isRecording);
  find("record").textContent = isRecording ? "Stop recording" : "Record";
}

function download(suffix) {
  const rows = current.segments.map(({ shownWords, ...row }) => ({ ...row, words: row.words.map(({ button, ...word }) => word) }));
  const texts = {
    srt: current.done.srt,
    vtt: current.done.vtt,
    txt: `${current.segments.map((segment) => segment.text).join("\n")}\n`,
    json: `${JSON.stringify({ text: current.done.text, duration: current.done.duration, segments: rows })}\n`,
  };
  const link = element("a", "", { download: `${current.name.replace(/\.\w+$/, "")}.${suffix}` });
  link.href = URL.createObjectURL(new Blob([texts[suffix]], { type: "text/plain" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function focusWord(button) {
  for (const word of document.querySelectorAll("button.word[tabindex='0']")) word.tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
}

find("segments").addEventListener("keydown", (event) => {
  if (!event.target.matches("button.word")) return;
  const words = [...document.querySelectorAll("button.word")];
  const at = words.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: words.length - 1 };
  const next = words[to[event.key]];
  if (!next) return;
  event.preventDefault();
  focusWord(next);
});

find("wave").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") audio.paused ? audio.play() : audio.pause();
  else if (event.key === "ArrowRight") seek(audio.currentTime + 1);
  else if (event.key === "ArrowLeft") seek(audio.currentTime - 1);
  else return;
  event.preventDefault();
});

find("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = ""; // so that the same file can be chosen again
  if (file) transcribe(file, file.name);
});
find("record").addEventListener("click", record);
find("cancel").addEventListener("click", () => {
  current.abort.abort();
  say("Stopped.");
});
find("downloads").addEventListener("click", (event) => event.target.dataset.suffix && download(event.target.dataset.suffix));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", ["dragenter", "dragover"].includes(kind));
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) transcribe(file, file.name);
  });

fetch("health").then((response) => response.json()).then(({ model, pyav }) => {
  find("model").textContent = `model ${model}`;
  hasPyav = pyav;
}, () => {}); // sending a recording will show the error

// Minutes and seconds, as in 1:05.
function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function element(tag, text = "", fields = {}) {
  return Object.assign(document.createElement(tag), text && { textContent: text }, fields);
}
