// A dense model beside a slim one: what each says of an image, and how long it takes.
//
// Each lies in a folder of its own, dense/ and slim/, as `slimming export … --to onnx` left it.

import { preprocess } from "./preprocess.js";

const NAMES = ["dense", "slim"];
const ROUNDS = 15;
const ROUND_MS = 20; // browsers' clocks are coarse, so a fast model runs several times in a round
const RUNTIME = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);

const element = (id) => document.getElementById(id);
const median = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];
const pause = () => new Promise((resolve) => setTimeout(resolve));
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const milliseconds = (time) => `${time.toPrecision(3)} ms`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;

let ort;

/** A message for the reader, who can mend what went wrong. */
function say(text, state) {
  element("status").textContent = text;
  document.body.className = state === "failed" ? "failed" : "";
  document.documentElement.dataset.state = state;
}

async function fetched(path, hint) {
  const answer = await fetch(path, { cache: "no-cache" }).catch(() => null);
  if (!answer?.ok) throw new Error(`${path} could not be read. ${hint}`);
  return answer;
}

async function openRuntime() {
  try {
    ort = await import(new URL("ort.wasm.min.mjs", RUNTIME));
  } catch {
    throw new Error("onnxruntime-web could not be loaded. Run npm install in the folder of this page.");
  }
  ort.env.wasm.wasmPaths = RUNTIME.href;
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
}

async function openModel(name) {
  const hint = `Export a model there: slimming export CHECKPOINT --to onnx --output ${name}`;
  const about = await (await fetched(`${name}/model.json`, hint)).json().catch(() => {
    throw new Error(`${name}/model.json is damaged. ${hint}`);
  });
  const bytes = new Uint8Array(await (await fetched(`${name}/model.onnx`, hint)).arrayBuffer());
  try {
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    return { name, about, bytes: bytes.length, session };
  } catch (error) {
    throw new Error(`${name}/model.onnx could not be opened: ${error.message}`);
  }
}

function drawCard({ name, bytes }) {
  const section = element(name);
  section.replaceChildren(element("card").content.cloneNode(true));
  section.querySelector("h2").id = `${name}-name`;
  section.querySelector("h2").textContent = name;
  section.querySelector(".size").textContent = megabytes(bytes);
}

/** The pixels of an image file, upright, on white, in the colours that the file holds. */
async function decode(file) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(file, options).catch(() => {
    throw new Error(`${file.name} is no image that this browser can read.`);
  });
  const canvas = element("seen");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  canvas.hidden = false;
  element("ask").textContent = `${file.name}, ${bitmap.width} × ${bitmap.height}. Drop or choose another.`;
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** A function that runs a model on an image once, and returns its logits. */
function prepared({ about, session }, pixels) {
  const [, ...shape] = about.input.shape;
  const feeds = { [about.input.name]: new ort.Tensor("float32", preprocess(pixels, about.preprocessing), [1, ...shape]) };
  return async () => (await session.run(feeds))[about.output.name].data;
}

async function timed(run, count) {
  const start = performance.now();
  for (let k = 0; k < count; k++) await run();
  return (performance.now() - start) / count;
}

/** Milliseconds of one run of each function: medians over rounds in turns, after a warm-up. */
async function race(runs) {
  const counts = [];
  for (const run of runs) {
    await run();
    counts.push(Math.ceil(ROUND_MS / Math.max(await timed(run, 2), 0.1)));
  }
  const times = runs.map(() => []);
  for (let round = 0; round < ROUNDS; round++) {
    say(`Timing, round ${round + 1} of ${ROUNDS} …`, "busy");
    await pause(); // lets the browser draw
    for (const [k, run] of runs.entries()) times[k].push(await timed(run, counts[k]));
  }
  return times.map(median);
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const total = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / total);
}

function drawResult({ name, about }, logits, time) {
  const best = [...softmax(logits).entries()].sort((a, b) => b[1] - a[1]).slice(0, 5);
  const lines = best.map(([index, share]) => {
    const line = document.createElement("li");
    const [label, value] = [document.createElement("span"), document.createElement("span")];
    const bar = document.createElement("i");
    label.textContent = about.classes[index] ?? `class ${index}`;
    value.textContent = percent(share);
    bar.style.setProperty("--share", `${100 * share}%`);
    line.append(label, value, bar);
    return line;
  });
  element(name).querySelector("ol").replaceChildren(...lines);
  element(name).querySelector(".time").textContent = milliseconds(time);
}

async function show(models, file) {
  element("file").disabled = true;
  try {
    say("Reading the image …", "busy");
    element("summary").hidden = true;
    const pixels = await decode(file);
    const runs = models.map((model) => prepared(model, pixels));
    const times = await race(runs);
    const logits = [];
    for (const run of runs) logits.push(Array.from(await run()));
    models.forEach((model, k) => drawResult(model, logits[k], times[k]));
    const [dense, slim] = models;
    element("summary").textContent =
      `The slim model is ${(times[0] / times[1]).toFixed(2)} times as fast; its file has ${percent(slim.bytes / dense.bytes)} of the size.`;
    element("summary").hidden = false;
    globalThis.shown = { logits, times }; // for the console
    say(`Median of ${ROUNDS} rounds in turns, one thread of the CPU.`, "done");
  } catch (error) {
    say(error.message, "failed");
  }
  element("file").disabled = false;
  element("file").value = ""; // so that the same file can be chosen again
  element("file").focus({ preventScroll: true });
}

function listen(models) {
  const take = (files) => files.length && !element("file").disabled && show(models, files[0]);
  element("file").addEventListener("change", (event) => take(event.target.files));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      document.querySelector(".choose").classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files);
    });
  }
  element("file").disabled = false;
}

try {
  await openRuntime();
  const models = [];
  for (const name of NAMES) models.push(await openModel(name));
  models.forEach(drawCard);
  listen(models);
  say("Both models are ready.", "ready");
} catch (error) {
  say(error.message, "failed");
}
