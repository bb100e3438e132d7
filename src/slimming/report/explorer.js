// Data, helpers and the state that all parts of the explorer share.
const runs = JSON.parse(document.getElementById("explorer-data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const SIDES = ["a", "b"];
const LIMITS = { macs: "MACs", params: "parameters", latency: "predicted time" };
const COSTS = { macs: "MACs", params: "Parameters", memory: "Memory", time: "Predicted time" };
const RUN_COLOURS = ["var(--accent)", "var(--v)", "var(--mlp)", "var(--token)", "var(--ink)", "var(--soft)"];
const NBSP = "\u00a0";
// Per side: number of the run, metric of the limit, place among its plans.
const chosen = { a: { run: 0, metric: "", at: 0 }, b: { run: 0, metric: "", at: 0 } };
let active = "a";

const byId = (id) => document.getElementById(id);

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function drawing(width, height, label, shapes, kind = "") {
  const made = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  if (kind) made.setAttribute("class", kind);
  made.append(...shapes);
  return made;
}

const runOf = (side) => runs[chosen[side].run];
const stepsOf = (side) => runOf(side).steps[chosen[side].metric];
const stepOf = (side) => stepsOf(side)[chosen[side].at];
const stateOf = (side, layer) => runOf(side).states[stepOf(side).layers[layer]];
const shown = () => (byId("compare").checked ? SIDES : ["a"]);

function percent(value, most = 1) {
  return `${Number((100 * value).toFixed(most))}${NBSP}%`;
}

function count(value, unit) {
  const [size, prefix] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]].find(([s]) => value >= s) || [1, ""];
  const number = value / size;
  return `${number.toFixed(number < 10 ? 2 : number < 100 ? 1 : 0)}${NBSP}${prefix}${unit}`;
}

function told(key, value) {
  if (value === null || value === undefined) return "not known";
  if (key === "time") return `${value.toPrecision(3)}${NBSP}ms`;
  return count(value, key === "memory" ? "B" : "").trim();
}

// "43 % of the MACs", in words for titles and for those who listen.
function title(side) {
  return `${percent(stepOf(side).share)} of the ${LIMITS[chosen[side].metric]}`;
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, place) => {
    if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = place;
  });
  return best;
}

function recipe(side, kind) {
  const step = stepOf(side), parts = runOf(side).recipe[kind];
  return `${parts[0]}${chosen[side].metric}=${step.share}${parts[1]}${step.name}${parts[2]}`;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

// Which positions a hexadecimal number keeps: a leading 1 guards its zeros.
function positions(hex) {
  return BigInt(`0x${hex}`).toString(2).slice(1);
}
