// What a budget keeps: one line per layer, token positions over images, and all of it as a table.
const [QK, V, MLP, HEADS, CHANNELS, TOKENS] = [0, 1, 2, 3, 4, 5];
const BARS = [[MLP, "MLP units", "--mlp"], [HEADS, "heads", "--v"], [CHANNELS, "channels", "--qk"], [TOKENS, "tokens", "--token"]];
const WIDE = 560;

const box = (x, y, width, height) =>
  `M${x.toFixed(1)} ${y.toFixed(1)}h${width.toFixed(1)}v${height.toFixed(1)}h${(-width).toFixed(1)}z`;

function kept(state, part) {
  if (part === TOKENS) return state[TOKENS] === null ? null : positions(state[TOKENS]).split("1").length - 1;
  return Array.isArray(state[part]) ? sum(state[part]) : state[part];
}

function size(whole, part) {
  if (part === TOKENS) return whole[TOKENS] === null ? null : whole[TOKENS][0] * whole[TOKENS][1];
  return Array.isArray(whole[part]) ? sum(whole[part]) : whole[part];
}

// Where the columns of a drawing lie: a grid of heads, and a bar for every other kind that some layer has.
function columns(run, left) {
  const bars = BARS.filter(([part]) => run.whole.some((whole) => size(whole, part) !== null));
  const heads = Math.max(0, ...run.whole.map((whole) => Math.max((whole[QK] || []).length, (whole[V] || []).length)));
  const free = WIDE - left - 10;
  const grid = heads ? (bars.length ? Math.min(0.58 * free, 34 * heads) : Math.min(free, 34 * heads)) : 0;
  const each = bars.length ? (free - grid - (grid ? 18 : 0)) / bars.length : 0;
  return { heads, cell: heads ? grid / heads : 0, grid, bars, from: left + grid + (grid ? 18 : 0), each: Math.min(each, 300) };
}

function drawStructure(side) {
  const run = runOf(side), rows = run.whole.length;
  const tall = rows <= 16 ? 22 : rows <= 40 ? 15 : 9;
  const left = Math.min(150, Math.max(26, 6.2 * Math.max(0, ...run.labels.map((text) => text.length)) + 10));
  const lay = columns(run, left), paths = { full: "", qk: "", v: "", gone: "", cross: "" }, fills = lay.bars.map(() => "");
  const parts = [], tips = [], every = rows <= 40 ? 1 : Math.ceil(rows / 40);
  if (lay.heads) {
    parts.push(shape("text", { x: left, y: 11, class: "title" }, lay.grid > 150 ? "heads: QK above, V below" : "heads: QK, V"));
  }
  lay.bars.forEach(([, name], place) => parts.push(
    shape("text", { x: lay.from + place * lay.each, y: 11, class: "title" }, name)));
  run.whole.forEach((whole, row) => {
    const y = 18 + row * tall, state = stateOf(side, row), words = [];
    if (row % every === 0) {
      const text = run.labels[row].length > 24 ? `…${run.labels[row].slice(-23)}` : run.labels[row];
      parts.push(shape("text", { x: left - 7, y: y + tall / 2 + 3.5, class: "tick end" }, text));
    }
    headRow(lay, paths, whole, state, left, y, tall);
    if (whole[QK]) words.push(`QK ${state[QK].join(" ")}`);
    if (whole[V]) words.push(`V ${state[V].join(" ")}`);
    lay.bars.forEach(([part, name], place) => {
      const of = size(whole, part);
      if (of === null) return;
      const now = kept(state, part), x = lay.from + place * lay.each, room = lay.each - 48;
      paths.full += box(x, y + tall * 0.18, room, tall * 0.64);
      fills[place] += box(x, y + tall * 0.18, room * (now / of), tall * 0.64);
      if (row % every === 0) {
        parts.push(shape("text", { x: x + room + 6, y: y + tall / 2 + 3.5, class: "tick" }, String(now)));
      }
      words.push(`${now} of ${of} ${name}`);
    });
    tips.push(shape("rect", { x: 0, y, width: WIDE, height: tall, class: "row", "data-tip": `${run.labels[row]}: ${words.join(", ")}` }));
  });
  const fill = (d, colour) => shape("path", { d, style: `fill:var(${colour})` });
  const drawn = [shape("path", { d: paths.full, class: "full" }), fill(paths.qk, "--qk"), fill(paths.v, "--v"),
    ...lay.bars.map(([, , colour], place) => fill(fills[place], colour)),
    shape("path", { d: paths.gone, class: "gone" }), shape("path", { d: paths.cross, class: "cross" })];
  const label = `What ${rows} layers keep under budget ${side.toUpperCase()}, ${title(side)}. The table below has the numbers.`;
  byId(`structure-${side}`).replaceChildren(
    drawing(WIDE, 22 + rows * tall, label, [...drawn, ...parts, ...tips], "structure-drawing"), ...widths(side));
}

function headRow(lay, paths, whole, state, left, y, tall) {
  const count = Math.max((whole[QK] || []).length, (whole[V] || []).length);
  const room = Math.max(1, lay.cell - 3), half = tall / 2 - 2.5;
  for (let head = 0; head < count; head += 1) {
    const x = left + head * lay.cell;
    const now = [QK, V].map((part) => (whole[part] ? (state[part] || [])[head] || 0 : null));
    if (now.every((value) => !value)) {
      paths.gone += box(x + 0.5, y + 2, room - 1, tall - 4);
      const reach = Math.min(3, half);
      paths.cross += `M${(x + room / 2 - reach).toFixed(1)} ${(y + tall / 2 - reach).toFixed(1)}l${2 * reach} ${2 * reach}m0 ${-2 * reach}l${-2 * reach} ${2 * reach}`;
      continue;
    }
    [["qk", QK, y + 2], ["v", V, y + 2 + half + 1]].forEach(([name, part, top], place) => {
      if (now[place] === null) return;
      paths.full += box(x, top, room, half);
      paths[name] += box(x, top, room * (now[place] / whole[part][head]), half);
    });
  }
}

function widths(side) {
  const found = Object.entries(runOf(side).widths), step = stepOf(side);
  if (!found.length || !step.widths) return [];
  const words = found.map(([name, of], place) => `${found.length > 1 ? `${name} ` : ""}${step.widths[place]} of ${of}`);
  return [node("p", { class: "width" }, `Embedding width: ${words.join(", ")}`)];
}

// Darkens what is cut; where there is no image, what stays is coloured in.
function drawTokens(side) {
  const run = runOf(side), target = byId(`tokens-${side}`);
  const picture = run.pictures[Number(byId("image") ? byId("image").value : 0) % Math.max(1, run.pictures.length)];
  const tiles = run.whole.flatMap((whole, row) => {
    if (whole[TOKENS] === null) return [];
    const [down, across] = whole[TOKENS], bits = positions(stateOf(side, row)[TOKENS]);
    const width = 96, height = picture ? Math.round(width * picture.shape) : Math.round((width * down) / across);
    const w = width / across, h = height / down, cells = [];
    for (let at = 0; at < bits.length; at += 1) {
      if ((bits[at] === "0") === Boolean(picture)) cells.push(box((at % across) * w, Math.floor(at / across) * h, w, h));
    }
    let mesh = "";
    for (let c = 1; c < across; c += 1) mesh += `M${(c * w).toFixed(1)} 0v${height}`;
    for (let r = 1; r < down; r += 1) mesh += `M0 ${(r * h).toFixed(1)}h${width}`;
    const stay = bits.split("1").length - 1, words = `${stay} of ${bits.length}`;
    const label = `Block ${run.labels[row]} sees ${words} token positions${picture ? `, over an image of class ${picture.label}` : ""}`;
    const parts = [shape("path", { d: cells.join(""), class: picture ? "dark" : "seen" }), shape("path", { d: mesh, class: "mesh" })];
    if (picture) parts.unshift(shape("use", { href: `#${picture.id}`, width, height }));
    return [node("figure", { class: "tile" }, drawing(width, height, label, parts),
      node("figcaption", {}, node("b", {}, `block ${run.labels[row]}`), node("span", {}, words)))];
  });
  target.replaceChildren(...(tiles.length ? [node("h4", {}, "Token positions that each block sees"),
    node("div", { class: "tiles small" }, ...tiles)] : []));
}

function drawTable(side) {
  const run = runOf(side), heads = [];
  for (const [part, name] of [[QK, "QK per head"], [V, "V per head"], ...BARS]) {
    if (run.whole.some((whole) => size(whole, part) !== null)) heads.push([part, name]);
  }
  const head = node("tr", {}, node("th", { scope: "col" }, "layer"), ...heads.map(([, name]) => node("th", { scope: "col" }, name)));
  const body = run.whole.map((whole, row) => {
    const state = stateOf(side, row);
    return node("tr", {}, node("th", { scope: "row" }, run.labels[row]), ...heads.map(([part]) => {
      if (size(whole, part) === null) return node("td", {}, "–");
      const list = Array.isArray(state[part]);
      return node("td", {}, list ? state[part].join(" ") : `${kept(state, part)} of ${size(whole, part)}`);
    }));
  });
  byId(`table-${side}`).replaceChildren(node("table", { class: "layers" }, node("thead", {}, head), node("tbody", {}, ...body)));
}
