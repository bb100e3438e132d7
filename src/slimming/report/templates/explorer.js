// The explorer: controls change the state, and everything shown follows from it.
const runs = read("explorer-data"), charts = read("explorer-charts");
const SIDES = ["a", "b"], ACROSS = 6, NBSP = "\u00a0";
const LIMITS = { macs: "MACs", params: "parameters", latency: "predicted time" };
const COSTS = { macs: "MACs", params: "Parameters", memory: "Memory", time: "Predicted time" };
const NAMES = { qk: "QK per head", v: "V per head", whole_heads: "heads", mlp: "MLP units", channels: "channels", tokens: "tokens" };
// Per side: number of the run, metric of the limit, place among its plans.
const chosen = { a: { run: 0, metric: "", at: 0 }, b: { run: 0, metric: "", at: 0 } };
// Views of Vega as promises, and what they are of: a cost for the frontier, a run for the parts of each side.
const views = { frontier: {}, a: {}, b: {} };
let active = "a", saying = 0;

const byId = (id) => document.getElementById(id);
const runOf = (side) => runs[chosen[side].run];
const stepsOf = (side) => runOf(side).steps[chosen[side].metric];
const stepOf = (side) => stepsOf(side)[chosen[side].at];
const shown = () => (byId("compare").checked ? SIDES : ["a"]);
const percent = (value, most = 1) => `${Number((100 * value).toFixed(most))}${NBSP}%`;
const title = (side) => `${percent(stepOf(side).share)} of the ${LIMITS[chosen[side].metric]}`;

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function told(key, value) {
  if (value === null) return "not known";
  if (key === "time") return `${value.toPrecision(3)}${NBSP}ms`;
  const [size, prefix] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([s]) => value >= s) || [1, ""];
  const number = value / size, digits = number < 10 ? 2 : number < 100 ? 1 : 0;
  return `${number.toFixed(digits)}${NBSP}${prefix}${key === "memory" ? "B" : ""}`.trim();
}

function nearest(values, wanted) {
  const far = values.map((value) => Math.abs(value - wanted));
  return far.indexOf(Math.min(...far));
}

function recipe(side, kind) {
  const { share, name } = stepOf(side), [start, middle, end] = runOf(side).recipe[kind];
  return `${start}${chosen[side].metric}=${share}${middle}${name}${end}`;
}

// Which positions a hexadecimal number keeps: a leading 1 guards its zeros.
const positions = (hex) => BigInt(`0x${hex}`).toString(2).slice(1);

function say(text, wait = 0) {
  clearTimeout(saying);
  saying = setTimeout(() => { byId("said").textContent = text; }, wait);
}

async function copy(side, kind) {
  const text = recipe(side, kind);
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without the permission, or from an insecure place: the old way.
    const area = node("textarea", { "aria-hidden": "true", class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`Copied the ${kind === "python" ? "Python" : "command"} that makes ${side.toUpperCase()}, ${title(side)}.`);
}

// Records of a chart of one part: what each layer, and each of its heads, keeps.
function units(side, part) {
  const own = stepOf(side).kept[part];
  return runOf(side).whole[part].map((one, place) => {
    const kept = own[place], told = kept || one.head === undefined ? `${kept} of ${one.of}` : "gone whole";
    return { ...one, kept, share: kept / one.of, told };
  });
}

// Records of the chart of token positions: a tile per layer; of its cells those that are cut, or without images that stay.
function maps(side) {
  const run = runOf(side), cells = [], tiles = run.grids.map((grid, layer) => {
    const bits = positions(stepOf(side).positions[layer]), [rows, columns] = grid || [0, 0];
    const row = Math.floor(layer / ACROSS), column = layer % ACROSS;
    [...bits].forEach((bit, at) => {
      if ((bit === "0") !== run.pictures.length > 0) return;
      const x = column + (at % columns) / columns, y = row + Math.floor(at / columns) / rows;
      cells.push({ x, x2: x + 1 / columns, y, y2: y + 1 / rows });
    });
    const told = bits ? `${bits.split("1").length - 1} of ${bits.length}` : "all positions";
    return { block: `block ${run.labels[layer]}`, told, picture: 0, row, column };
  });
  return { tiles, cells };
}

// The views of a side, made anew when its run changes: one per part of the structure, and the maps of token positions.
function stage(side) {
  const own = views[side], { run } = chosen[side], maps = charts.tokens[run];
  if (own.run === run) return own.parts;
  const add = (target, title, part, spec) => {
    const place = node("div", { role: "img", "aria-label": title, class: "drawing" });
    byId(`${target}-${side}`).append(node("figure", {}, node("h4", {}, title), place));
    return draw(place, spec).then((view) => ({ part, place, view, title }));
  };
  for (const target of ["structure", "tokens"]) byId(`${target}-${side}`).replaceChildren();
  own.parts = Promise.all([
    ...Object.entries(charts.structure[run]).map(([part, { title, spec }]) => add("structure", title, part, spec)),
    ...(maps ? [add("tokens", "Token positions that each block sees", null, maps)] : []),
  ]);
  own.run = run;
  return own.parts;
}

async function drawViews(side) {
  for (const { part, place, view, title: name } of await stage(side)) {
    const data = part === null ? maps(side) : { units: units(side, part) }, found = runOf(side).pictures;
    const words = (data.tiles || []).map((one) => `${one.block}: ${one.told}`).join("; ");
    if (part === null && found.length) view.signal("pictures", [found[Number(byId("image").value) % found.length].address]);
    for (const [key, records] of Object.entries(data)) view.data(key, records);
    place.setAttribute("aria-label", `${name}, ${title(side)}. ${words || "The table below has the numbers."}`);
    await view.runAsync();
  }
}

async function drawFrontier() {
  const axis = byId("axis").value, own = views.frontier, place = byId("frontier"), { spec } = charts.frontier[axis];
  if (shown().some((side) => stepOf(side)[axis] === null)) {
    own.axis = "";
    place.replaceChildren(node("p", {}, "One of these runs does not say what this costs."));
    return;
  }
  if (own.axis !== axis) Object.assign(own, { axis, view: draw(place, spec) });
  const view = await own.view;
  if (own.axis !== axis) return;
  const points = (steps) => shown().flatMap((side) => steps(side).map((step) =>
    ({ side: side.toUpperCase(), x: step[axis], y: 100 * step.score })));
  place.setAttribute("aria-label", spec.description);
  await view.data("plans", points(stepsOf)).data("chosen", points((side) => [stepOf(side)])).runAsync();
}

// The plan nearest to the pointer, for the side that was used last; its recipe is copied.
function clickFrontier(event) {
  const plot = byId("frontier").querySelector("svg .concat_1_group .background"), axis = byId("axis").value;
  if (!plot) return;
  const box = plot.getBoundingClientRect();
  const cost = ((event.clientX - box.left) / box.width) * charts.frontier[axis].most;
  choose(active, nearest(stepsOf(active).map((step) => step[axis]), cost));
  copy(active, document.querySelector("input[name=copies]:checked").value);
}

function choose(side, at) {
  chosen[side].at = Math.min(Math.max(at, 0), stepsOf(side).length - 1);
  active = side;
  update([side]);
  const step = stepOf(side), words = { macs: " MACs", params: " parameters", memory: " of memory", time: "" };
  const costs = Object.keys(COSTS).filter((key) => step[key] !== null).map((key) => told(key, step[key]) + words[key]);
  say(`Budget ${side.toUpperCase()}: ${title(side)}. ${costs.join(", ")}.`, 350);
}

function writeSide(side) {
  const { at } = chosen[side], slider = byId(`slider-${side}`), last = stepsOf(side).length - 1;
  slider.max = last;
  slider.value = at;
  slider.setAttribute("aria-valuetext", title(side));
  byId(`share-${side}`).textContent = percent(stepOf(side).share);
  byId(`less-${side}`).disabled = at === 0;
  byId(`more-${side}`).disabled = at === last;
  byId(`title-${side}`).textContent = `${runs.length > 1 ? `${runOf(side).name}: ` : ""}${title(side)}`;
  for (const kind of ["command", "python"]) byId(`${kind}-${side}`).textContent = recipe(side, kind);
  byId(`recipe-note-${side}`).textContent = runOf(side).recipe.note;
  writeTable(side);
  return drawViews(side);
}

function writeTable(side) {
  const run = runOf(side), parts = Object.keys(NAMES).filter((part) => part in run.whole);
  const found = parts.map((part) => units(side, part));
  const words = (own) => (own.length > 1 ? own.map((one) => one.kept).join(" ") : own.length ? own[0].told : "–");
  const head = node("tr", {}, ...["layer", ...parts.map((part) => NAMES[part])].map((text) => node("th", { scope: "col" }, text)));
  const body = run.labels.map((layer) => node("tr", {}, node("th", { scope: "row" }, layer),
    ...found.map((own) => node("td", {}, words(own.filter((one) => one.layer === layer))))));
  byId(`table-${side}`).replaceChildren(node("table", { class: "plain" }, node("thead", {}, head), node("tbody", {}, ...body)));
}

// The measured budgets next to the plan, below and above: what is known of its accuracy.
function neighbours(side) {
  const { macs } = stepOf(side), known = runOf(side).measured.filter((one) => one.quality !== null).sort((a, b) => a.macs - b.macs);
  const found = [known.filter((one) => one.macs <= macs).pop(), known.find((one) => one.macs > macs)].filter(Boolean);
  return found.map((one) => `${one.label} ${one.quality}`).join(" · ") || "not measured yet";
}

function writeNumbers() {
  const sides = shown(), row = (name, cells) => node("tr", {}, node("th", { scope: "row" }, name), ...cells);
  byId("head-b").hidden = sides.length < 2;
  for (const side of sides) byId(`head-${side}`).textContent = `${side.toUpperCase()} · ${title(side)}`;
  const known = Object.keys(COSTS).filter((key) => sides.some((side) => stepOf(side)[key] !== null));
  const costs = known.map((key) => row(COSTS[key], sides.map((side) => {
    const value = stepOf(side)[key], share = value === null ? "" : ` ${percent(value / runOf(side).dense[key])} of dense`;
    return node("td", {}, told(key, value), node("small", {}, share));
  })));
  byId("numbers").replaceChildren(...costs,
    row("Score kept", sides.map((side) => node("td", {}, percent(stepOf(side).score, 2)))),
    row(`Measured beside it, ${runOf(sides[0]).metric}`, sides.map((side) => node("td", { class: "near" }, neighbours(side)))));
  const devices = [...new Set(sides.map((side) => runOf(side).latency).filter(Boolean))];
  byId("frontier-note").textContent = devices.length ? `Times are predicted by a latency table: ${devices.join("; ")}.` : "";
}

function update(sides) {
  writeNumbers();
  return Promise.all([...sides.map(writeSide), drawFrontier()]);
}

// What a side may limit, and its measured budgets, each a button that goes there.
function setLimits(side) {
  const select = byId(`limit-${side}`), own = Object.keys(runOf(side).steps);
  for (const option of select.options) option.hidden = option.disabled = !own.includes(option.value);
  if (!own.includes(chosen[side].metric)) chosen[side].metric = own[0];
  select.value = chosen[side].metric;
  const found = runOf(side).measured.filter((one) => chosen[side].metric in one.limits);
  byId(`goto-${side}`).replaceChildren(...(found.length ? ["Measured: "] : []), ...found.map((one) => {
    const button = node("button", { type: "button" }, percent(one.limits[chosen[side].metric]));
    button.addEventListener("click", () => choose(side, nearest(stepsOf(side).map((step) => step.share), one.limits[chosen[side].metric])));
    return button;
  }));
}

// Which image the token maps lie over.
function setImages() {
  const found = charts.tokens[chosen.a.run] ? runOf("a").pictures : [], select = byId("image"), at = Number(select.value);
  byId("image-choice").hidden = found.length === 0;
  select.replaceChildren(...found.map((one, place) => node("option", { value: place }, one.label)));
  select.value = at < found.length ? at : 0;
}

function compare() {
  const both = byId("compare").checked;
  for (const part of ["side-b", "view-b"]) byId(part).hidden = !both;
  byId("explorer").classList.toggle("both", both);
  if (!both) active = "a";
  return update(shown());
}

function wire(side) {
  const slider = byId(`slider-${side}`), run = byId(`run-${side}`), limit = byId(`limit-${side}`);
  const keep = (change) => () => {
    const { share } = stepOf(side);
    change();
    setLimits(side);
    choose(side, nearest(stepsOf(side).map((step) => step.share), share));
  };
  slider.addEventListener("input", () => choose(side, Number(slider.value)));
  byId(`less-${side}`).addEventListener("click", () => choose(side, chosen[side].at - 1));
  byId(`more-${side}`).addEventListener("click", () => choose(side, chosen[side].at + 1));
  limit.addEventListener("change", keep(() => { chosen[side].metric = limit.value; }));
  if (run) run.addEventListener("change", keep(() => { chosen[side].run = Number(run.value); setImages(); }));
  for (const kind of ["command", "python"]) byId(`copy-${kind}-${side}`).addEventListener("click", () => copy(side, kind));
  chosen[side].run = run ? Number(run.value) : 0;
  setLimits(side);
  const share = side === "a" || runs.length > 1 ? 0.7 : 0.4;
  chosen[side].at = nearest(stepsOf(side).map((step) => step.share), share);
}

SIDES.forEach(wire);
setImages();
byId("axis").addEventListener("change", drawFrontier);
byId("image").addEventListener("change", () => shown().forEach(drawViews));
byId("compare").addEventListener("change", compare);
byId("frontier").addEventListener("click", clickFrontier);
byId("explorer").hidden = false;
compare().then(() => { document.documentElement.dataset.explorer = "ready"; });
