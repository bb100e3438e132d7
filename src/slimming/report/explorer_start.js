// Controls: each changes the state and draws what depends on it.
let saying = 0;

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
    const area = node("textarea", { "aria-hidden": "true", class: "store" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const what = kind === "python" ? "Python" : "command";
  say(`Copied the ${what} that makes ${side.toUpperCase()}, ${title(side)}.`);
}

function choose(side, at) {
  chosen[side].at = Math.min(Math.max(at, 0), stepsOf(side).length - 1);
  active = side;
  draw([side]);
  const step = stepOf(side);
  const costs = Object.keys(COSTS).filter((key) => step[key] !== null)
    .map((key) => `${told(key, step[key])}${{ macs: " MACs", params: " parameters", memory: " of memory", time: "" }[key]}`);
  say(`Budget ${side.toUpperCase()}: ${title(side)}. ${costs.join(", ")}.`, 350);
}

function drawSide(side) {
  const step = stepOf(side), slider = byId(`slider-${side}`);
  slider.max = stepsOf(side).length - 1;
  slider.value = chosen[side].at;
  slider.setAttribute("aria-valuetext", title(side));
  byId(`share-${side}`).textContent = percent(step.share);
  byId(`less-${side}`).disabled = chosen[side].at === 0;
  byId(`more-${side}`).disabled = chosen[side].at === stepsOf(side).length - 1;
  byId(`title-${side}`).textContent = `${runs.length > 1 ? `${runOf(side).name}: ` : ""}${title(side)}`;
  byId(`command-${side}`).textContent = recipe(side, "command");
  byId(`python-${side}`).textContent = recipe(side, "python");
  byId(`recipe-note-${side}`).textContent = runOf(side).recipe.note;
  drawStructure(side);
  drawTokens(side);
  drawTable(side);
}

// Measured budgets of the run, each a button that goes there.
function drawGoto(side) {
  const { run, metric } = chosen[side], found = runs[run].measured.filter((one) => one.limit === metric);
  byId(`goto-${side}`).replaceChildren(...(found.length ? ["Measured: "] : []), ...found.map((one) => {
    const button = node("button", { type: "button" }, percent(one.share));
    button.addEventListener("click", () => choose(side, nearest(stepsOf(side).map((step) => step.share), one.share)));
    return button;
  }));
}

function cells(key, sides) {
  return sides.map((side) => {
    const value = stepOf(side)[key], dense = runOf(side).dense[key];
    const cell = node("td", {}, told(key, value));
    if (value !== null) cell.append(node("small", {}, ` ${percent(value / dense)} of dense`));
    return cell;
  });
}

// The measured budgets next to the plan, below and above: what is known of its accuracy.
function neighbours(side) {
  const step = stepOf(side), known = runOf(side).measured.filter((one) => one.top1 !== null).sort((a, b) => a.macs - b.macs);
  if (!known.length) return "not measured yet";
  const below = known.filter((one) => one.macs <= step.macs).pop(), above = known.find((one) => one.macs > step.macs);
  const words = (one) => `${one.label} ${percent(one.top1)}`;
  return [below, above].filter(Boolean).map(words).join(" · ");
}

function drawNumbers() {
  const sides = shown(), rows = [];
  byId("head-b").hidden = sides.length < 2;
  for (const side of sides) byId(`head-${side}`).textContent = `${side.toUpperCase()} · ${title(side)}`;
  for (const [key, name] of Object.entries(COSTS)) {
    if (sides.every((side) => stepOf(side)[key] === null)) continue;
    rows.push(node("tr", {}, node("th", { scope: "row" }, name), ...cells(key, sides)));
  }
  rows.push(node("tr", {}, node("th", { scope: "row" }, "Score kept"),
    ...sides.map((side) => node("td", {}, percent(stepOf(side).score, 2)))));
  rows.push(node("tr", {}, node("th", { scope: "row" }, "Measured beside it, top-1"),
    ...sides.map((side) => node("td", { class: "near" }, neighbours(side)))));
  byId("numbers").replaceChildren(...rows);
  const devices = [...new Set(sides.map((side) => runOf(side).latency).filter(Boolean))];
  byId("frontier-note").textContent = devices.length ? `Times are predicted by a latency table: ${devices.join("; ")}.` : "";
}

function draw(sides) {
  sides.forEach(drawSide);
  drawNumbers();
  drawFrontier();
}

function setLimits(side) {
  const select = byId(`limit-${side}`), own = Object.keys(runOf(side).steps);
  for (const option of select.options) option.hidden = option.disabled = !own.includes(option.value);
  if (!own.includes(chosen[side].metric)) chosen[side].metric = own[0];
  select.value = chosen[side].metric;
  drawGoto(side);
}

function wire(side) {
  const slider = byId(`slider-${side}`);
  slider.addEventListener("input", () => choose(side, Number(slider.value)));
  byId(`less-${side}`).addEventListener("click", () => choose(side, chosen[side].at - 1));
  byId(`more-${side}`).addEventListener("click", () => choose(side, chosen[side].at + 1));
  const keep = (change) => () => {
    const share = stepOf(side).share;
    change();
    setLimits(side);
    choose(side, nearest(stepsOf(side).map((step) => step.share), share));
  };
  byId(`limit-${side}`).addEventListener("change", keep(() => { chosen[side].metric = byId(`limit-${side}`).value; }));
  const run = byId(`run-${side}`);
  if (run) run.addEventListener("change", keep(() => { chosen[side].run = Number(run.value); drawImages(); drawLegend(); }));
  for (const kind of ["command", "python"]) byId(`copy-${kind}-${side}`).addEventListener("click", () => copy(side, kind));
}

// Which image the token maps lie over.
function drawImages() {
  const old = byId("image"), at = old ? old.value : "0";
  if (old) old.parentElement.remove();
  const found = runOf("a").pictures;
  if (!found.length || !runs.some((run) => run.whole.some((whole) => whole[TOKENS] !== null))) return;
  const select = node("select", { id: "image" }, ...found.map((one, place) => node("option", { value: place }, one.label)));
  select.value = Number(at) < found.length ? at : "0";
  select.addEventListener("change", () => shown().forEach(drawTokens));
  byId("compare").parentElement.after(node("label", { class: "image" }, "Image ", select));
}

function compare() {
  const both = byId("compare").checked;
  for (const part of ["side-b", "view-b"]) byId(part).hidden = !both;
  byId("explorer").classList.toggle("both", both);
  if (!both) active = "a";
  draw(shown());
}

function start() {
  for (const side of SIDES) {
    const run = byId(`run-${side}`);
    chosen[side].run = run ? Number(run.value) : 0;
    setLimits(side);
    const share = side === "a" ? 0.7 : runs.length > 1 ? 0.7 : 0.4;
    chosen[side].at = nearest(stepsOf(side).map((step) => step.share), share);
    wire(side);
  }
  drawImages();
  drawLegend();
  byId("axis").addEventListener("change", drawFrontier);
  byId("compare").addEventListener("change", compare);
  byId("explorer").hidden = false;
  compare();
  for (const side of SIDES) drawSide(side);
  document.documentElement.dataset.explorer = "ready";
}

start();
