// The frontier: accuracy where it was measured, above the share of the score that each plan keeps.
const CHART = { width: 620, left: 46, right: 14, top: 24, upper: 190, gap: 34, lower: 84, bottom: 40 };
CHART.mid = CHART.top + CHART.upper;
CHART.base = CHART.mid + CHART.gap + CHART.lower;
CHART.height = CHART.base + CHART.bottom;

function niceTicks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.75) || 10 * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at += 1) found.push(at * step);
  return { values: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function axisUnit(key) {
  const most = Math.max(...runs.map((run) => run.dense[key] || 0));
  if (key === "time") return { size: 1, name: "predicted time, ms" };
  const [size, prefix] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]].find(([s]) => most >= s) || [1, ""];
  return { size, name: `${prefix}${{ macs: "MACs for one image", params: " parameters", memory: "B of memory" }[key]}` };
}

function frontierFrame() {
  const key = byId("axis").value, unit = axisUnit(key);
  const most = Math.max(...runs.map((run) => run.dense[key] || 0)) / unit.size;
  const tops = runs.flatMap((run) => run.measured.flatMap((one) => [one.top1, one.cut, one.shot]))
    .filter((value) => value !== null).map((value) => 100 * value);
  const good = runs.flatMap((run) => run.measured).map((one) => one.top1).filter((v) => v !== null).map((v) => 100 * v);
  // What a bare cut leaves may lie far below all else; it is then drawn at the edge, as an arrow.
  const span = good.length ? Math.max(2, Math.max(...good) - Math.min(...good)) : 100;
  const low = good.length ? Math.max(0, Math.min(...tops.filter((v) => v >= Math.min(...good) - 2 * span)) - 0.2 * span) : 0;
  const high = good.length ? Math.min(100, Math.max(...tops) + 0.2 * span) : 100;
  const scores = SIDES.flatMap((side) => stepsOf(side).map((step) => 100 * step.score));
  const least = Math.min(Math.floor(Math.min(...scores) / 10) * 10, 90);
  const across = CHART.width - CHART.left - CHART.right;
  return {
    key, unit, low, high, least, measured: tops.length > 0,
    most: 1.04 * most,
    x: (value) => CHART.left + (value / unit.size / (1.04 * most)) * across,
    cost: (x) => ((x - CHART.left) / across) * 1.04 * most * unit.size,
    y: (top1) => CHART.mid - (Math.min(Math.max(100 * top1 - low, 0), high - low) / (high - low)) * CHART.upper,
    score: (value) => CHART.base - ((100 * value - least) / (100 - least)) * CHART.lower,
  };
}

function frontierAxes(frame) {
  const found = [], right = CHART.width - CHART.right;
  const level = (y, text) => found.push(
    shape("line", { x1: CHART.left, x2: right, y1: y, y2: y, class: "grid" }),
    shape("text", { x: CHART.left - 7, y: y + 3.5, class: "tick end" }, text));
  const above = niceTicks(frame.low, frame.high, 4);
  if (frame.measured) above.values.forEach((value) => level(frame.y(value / 100), value.toFixed(above.digits)));
  niceTicks(frame.least, 100, 2).values.forEach((value) => level(frame.score(value / 100), String(value)));
  const along = niceTicks(0, frame.most, 6);
  for (const value of along.values) {
    const x = frame.x(value * frame.unit.size);
    found.push(shape("line", { x1: x, x2: x, y1: CHART.base, y2: CHART.base + 4, class: "axis" }),
      shape("text", { x, y: CHART.base + 17, class: "tick mid" }, value.toFixed(along.digits)));
  }
  found.push(shape("line", { x1: CHART.left, x2: right, y1: CHART.base, y2: CHART.base, class: "axis" }),
    shape("text", { x: 2, y: 12, class: "title" }, "top-1, %"),
    shape("text", { x: 2, y: CHART.mid + CHART.gap - 12, class: "title" }, "score kept by each plan, %"),
    shape("text", { x: right, y: CHART.height - 5, class: "title end" }, frame.unit.name));
  if (!frame.measured) {
    found.push(shape("text", { x: (CHART.left + right) / 2, y: CHART.top + CHART.upper / 2, class: "tick mid" },
      "no accuracy was measured yet"));
  }
  return found;
}

function marker(frame, kind, x, y, colour, tip, below) {
  const group = shape("g", { class: "point", "data-tip": tip });
  if (below) group.append(shape("path", { d: `M${x} ${y - 1}l5 -8h-10z`, class: "ring", style: `stroke:${colour}` }));
  else if (kind === "diamond") group.append(shape("path", { d: `M${x} ${y - 6}l6 6l-6 6l-6 -6z`, style: `fill:${colour}` }));
  else if (kind === "square") {
    group.append(shape("rect", { x: x - 3.6, y: y - 3.6, width: 7.2, height: 7.2, class: "ring", style: `stroke:${colour}` }));
  } else if (kind === "ring") group.append(shape("circle", { cx: x, cy: y, r: 4, class: "ring", style: `stroke:${colour}` }));
  else group.append(shape("circle", { cx: x, cy: y, r: 4.6, style: `fill:${colour}` }));
  return group;
}

function frontierPoints(frame) {
  const found = [];
  runs.forEach((run, place) => {
    const colour = RUN_COLOURS[place % RUN_COLOURS.length], own = runs.length > 1 ? `${run.name}, ` : "";
    const known = run.measured.filter((one) => one[frame.key] !== null);
    const line = known.filter((one) => one.top1 !== null).sort((a, b) => a[frame.key] - b[frame.key]);
    if (line.length > 1) {
      const way = line.map((one) => `${frame.x(one[frame.key]).toFixed(1)} ${frame.y(one.top1).toFixed(1)}`).join("L");
      found.push(shape("path", { d: `M${way}`, class: "curve faded", style: `stroke:${colour}` }));
    }
    for (const one of known) {
      const x = frame.x(one[frame.key]), first = one === run.measured[0];
      const kinds = [["shot", "square", "in one shot"], ["cut", "ring", "after the cut"],
        ["top1", first ? "diamond" : "disc", first ? "as it was" : "retrained"]];
      for (const [field, kind, when] of kinds) {
        if (one[field] === null) continue;
        const tip = `${own}${one.label}: ${percent(one[field])} ${when}`;
        found.push(marker(frame, kind, x, frame.y(one[field]), colour, tip, 100 * one[field] < frame.low));
      }
    }
  });
  return found;
}

function frontierChoice(frame, side) {
  const step = stepOf(side), x = frame.x(step[frame.key]), y = frame.score(step.score), end = CHART.width - CHART.right;
  const colour = `var(--side-${side})`, found = [];
  const way = stepsOf(side).map((one) => `${frame.x(one[frame.key]).toFixed(1)} ${frame.score(one.score).toFixed(1)}`);
  const run = RUN_COLOURS[chosen[side].run % RUN_COLOURS.length];
  found.push(shape("path", { d: `M${way.join("L")}`, class: "curve", style: `stroke:${run}` }));
  found.push(shape("line", { x1: x, x2: x, y1: CHART.top, y2: CHART.base, class: "here", style: `stroke:${colour}`,
    "stroke-dasharray": side === "a" ? "" : "5 3" }));
  found.push(shape("circle", { cx: x, cy: y, r: 5.5, class: "ring", style: `stroke:${colour}` }));
  const flag = Math.min(Math.max(x, CHART.left + 9), end - 9);
  found.push(shape("rect", { x: flag - 9, y: CHART.top - 18, width: 18, height: 16, rx: 3, style: `fill:${colour}` }),
    shape("text", { x: flag, y: CHART.top - 6, class: "flag mid" }, side.toUpperCase()));
  return found;
}

function drawFrontier() {
  const frame = frontierFrame(), sides = shown();
  if (sides.some((side) => stepOf(side)[frame.key] === null)) {
    byId("frontier").replaceChildren(node("p", {}, "One of these runs does not say what this costs."));
    return;
  }
  const words = runs.flatMap((run) => run.measured.filter((one) => one.top1 !== null)
    .map((one) => `${runs.length > 1 ? `${run.name}, ` : ""}${one.label}: ${percent(one.top1)}`));
  const label = `Accuracy against ${frame.unit.name}. ${words.join("; ") || "Nothing was measured yet"}.`;
  const made = drawing(CHART.width, CHART.height, label,
    [...frontierAxes(frame), ...sides.flatMap((side) => frontierChoice(frame, side)), ...frontierPoints(frame)], "chart");
  made.addEventListener("click", (event) => clickFrontier(made, frame, event));
  byId("frontier").replaceChildren(made);
}

// The plan nearest to the pointer, for the side that was used last; its recipe is copied.
function clickFrontier(made, frame, event) {
  const box = made.getBoundingClientRect();
  const cost = frame.cost(((event.clientX - box.left) / box.width) * CHART.width);
  choose(active, nearest(stepsOf(active).map((step) => step[frame.key]), cost));
  copy(active, document.querySelector("input[name=copies]:checked").value);
}

function drawLegend() {
  const sample = (kind, colour, text, line) => {
    const svg = drawing(26, 12, "", [], "");
    svg.removeAttribute("role");
    svg.removeAttribute("aria-label");
    svg.setAttribute("aria-hidden", "true");
    if (line) svg.append(shape("line", { x1: 1, x2: 25, y1: 6, y2: 6, class: "curve", style: `stroke:${colour}` }));
    if (kind) svg.append(marker(null, kind, 13, 6, colour, "", false));
    return node("li", {}, svg, text);
  };
  const every = runs.flatMap((run) => run.measured.slice(1));
  const found = runs.length > 1 ? runs.map((run, place) =>
    sample("disc", RUN_COLOURS[place % RUN_COLOURS.length], run.name, true)) : [];
  const colour = runs.length > 1 ? "var(--soft)" : RUN_COLOURS[0];
  if (every.some((one) => one.top1 !== null)) found.push(sample("disc", colour, "retrained", false));
  if (every.some((one) => one.cut !== null)) found.push(sample("ring", colour, "after the cut", false));
  if (every.some((one) => one.shot !== null)) found.push(sample("square", colour, "in one shot", false));
  if (runs.some((run) => run.measured.length)) found.push(sample("diamond", colour, "dense", false));
  byId("frontier-legend").replaceChildren(...found);
}
