// The attention panels: one large map, arcs, small pictures of all heads, and head scores. The
// class Grid also draws the vectors of inside.js.

"use strict";

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const STEP = 15; // pixels from one character below the arcs to the next
const BASE = 104; // where the arcs end

// A heat map on a canvas; its cursor follows the pointer and the arrow keys.
class Grid {
  constructor(box, label, move, choose) {
    const role = { role: "application", "aria-roledescription": "heat map", "aria-label": label };
    this.canvas = h("canvas", { tabIndex: 0, ...role });
    this.cursor = h("div", { className: "cursor", hidden: true });
    box.append(h("div", { className: "frame" }, this.canvas, this.cursor));
    const visit = (event, act) => {
      const [row, column] = [event.offsetY - this.top, event.offsetX - this.left].map((x) =>
        Math.floor(x / this.cell),
      );
      if (this.has(row, column)) act(row, column);
    };
    this.canvas.onpointermove = (event) => {
      if (event.pointerType !== "touch") visit(event, move);
    };
    this.canvas.onclick = (event) => visit(event, choose);
    this.canvas.onkeydown = (event) => {
      const [down, right] = ARROWS[event.key] ?? [0, 0];
      if (!(event.key in ARROWS) && event.key !== "Enter") return;
      event.preventDefault();
      const [row, column] = [this.row + down, this.column + right];
      if (this.has(row, column)) (event.key === "Enter" ? choose : move)(row, column);
    };
  }

  has(row, column) {
    return Math.min(row, column) >= 0 && column < this.columns && row * this.columns + column < this.count;
  }

  // color(row, column) is a color, or null for a blank cell; labels are tokens for both sides.
  draw({ columns, count, cell, color, labels = null }) {
    const rows = Math.ceil(count / columns);
    const [left, top] = labels && cell >= 9 ? [22, 18] : [0, 0];
    Object.assign(this, { columns, count, cell, left, top });
    const [width, height] = [left + columns * cell, top + rows * cell];
    const ratio = Math.min(devicePixelRatio || 1, 4096 / Math.max(width, height)); // Safari's limit
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const size = cell > 6 ? cell - 1 : cell;
    for (let i = 0; i < count; i++) {
      const [row, column] = [Math.floor(i / columns), i % columns];
      context.fillStyle = color(row, column) ?? "transparent";
      context.fillRect(left + column * cell, top + row * cell, size, size);
    }
    if (!left) return;
    const font = `${Math.min(13, cell + 1)}px ui-monospace, monospace`;
    Object.assign(context, { fillStyle: mix("quiet", 1), font, textAlign: "center", textBaseline: "middle" });
    labels.forEach((token, i) => {
      context.fillText(glyph(token), left / 2, top + (i + 0.5) * cell, left);
      context.fillText(glyph(token), left + (i + 0.5) * cell, top / 2, Math.max(cell, 20));
    });
  }

  point(row, column) {
    Object.assign(this, { row, column });
    this.cursor.hidden = !this.has(row, column);
    const box = {
      left: this.left + column * this.cell,
      top: this.top + row * this.cell,
      width: this.cell,
      height: this.cell,
    };
    for (const [name, value] of Object.entries(box)) this.cursor.style[name] = `${value}px`;
  }
}

let map;
let keyPosition = 0; // under the cursor of the map
let scores = null; // of the selected head: every query with every key

function startAttention() {
  map = new Grid(
    find("#map"),
    "Attention map: rows are queries, columns are keys",
    pointAt,
    (row, column) => {
      pointAt(row, column);
      const name = state.view === "weights" ? "weights" : "scores";
      followCell({ step: stepOfLayer(state.layer), name, channel: column });
    },
  );
  find("#layer").onchange = ({ target }) => chooseHead(+target.value, 0);
  for (const name of ["#head", "#vector-head"]) {
    find(name).onchange = ({ target }) => chooseHead(state.layer, +target.value);
  }
  for (const each of all("[name=view]"))
    each.onchange = () => {
      state.view = each.value;
      drawMap();
    };
  find("#arcs").onkeydown = (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    select(state.position + sum(ARROWS[event.key]));
  };
}

const stepOfLayer = (layer) => state.run.steps.indexOf(state.run.attentions[layer]);
const partOfHead = (layer, head) => `${state.run.attentions[layer].module}.head ${head}`;
const weightsOf = (layer, head) => state.trace.attention[layer][head];

function isHeadOff(layer, head) {
  return [partOfHead(layer, head), state.run.attentions[layer].part].some((part) => state.run.off.has(part));
}

function pointAt(row, column) {
  keyPosition = column;
  if (row === state.position) drawQuery();
  else select(row);
}

function chooseHead(layer, head) {
  if (!state.trace) return;
  Object.assign(state, { layer, head });
  if (state.run.steps[state.cell.step].kind === "attention") state.cell.step = stepOfLayer(layer);
  drawHeadChoices();
  drawAttention();
  drawQuery();
  drawDiagram();
  follow();
}

function drawHeadChoices() {
  const { run, layer, head } = state;
  if (!run.attentions.length) return;
  const fill = (name, count, value) => {
    find(name).replaceChildren(...[...Array(count).keys()].map((i) => h("option", { value: i }, String(i))));
    find(name).value = value;
  };
  fill("#layer", run.attentions.length, layer);
  fill("#head", run.attentions[layer].heads, head);
  fill("#vector-head", run.attentions[layer].heads, head);
}

function drawAttention() {
  if (!state.run.attentions.length) return;
  drawThumbnails();
  drawHeadScores();
  drawMap();
}

// For each layer and head, a button that selects it.
function headButtons(make) {
  return state.run.attentions.map(({ heads }, layer) =>
    [...Array(heads).keys()].map((head) => {
      const isChosen = layer === state.layer && head === state.head;
      const properties = {
        type: "button",
        "aria-label": `Layer ${layer}, head ${head}`,
        "aria-pressed": isChosen,
      };
      return make(layer, head, h("button", { ...properties, onclick: () => chooseHead(layer, head) }));
    }),
  );
}

// Replace what is in a box; the button that had the focus has it again.
function replaceAll(box, children) {
  const index = all("button", box).indexOf(document.activeElement);
  box.replaceChildren(...children);
  all("button", box)[index]?.focus({ preventScroll: true });
}

// One small picture for each head, a pixel for each weight.
function drawThumbnails() {
  const T = Math.max(1, state.shown.ids.length);
  const layers = headButtons((layer, head, button) => {
    const canvas = h("canvas", { width: T, height: T });
    drawPixels(canvas.getContext("2d"), weightsOf(layer, head), T);
    button.classList.toggle("struck", isHeadOff(layer, head));
    button.append(canvas);
    return button;
  });
  replaceAll(
    find("#thumbnails"),
    layers.map((buttons, layer) => {
      const row = h(
        "div",
        { className: "layer" },
        h("span", { className: "quiet" }, `layer ${layer}`),
        ...buttons,
      );
      row.style.setProperty("--heads", buttons.length);
      return row;
    }),
  );
}

function drawPixels(context, weights, T) {
  const image = context.createImageData(T, T);
  weights.forEach((weight, i) => {
    const share = Math.sqrt(weight); // so that small weights are visible in a small picture
    const color = theme.background.map((from, c) => from + share * (theme.negative[c] - from));
    image.data.set([...color, 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

const loadScores = latest(async (isStale) => {
  const { run, layer, head } = state;
  const found = await ask(run, "scores", { layer, head });
  if (isStale() || run !== state.run) return;
  scores = found;
  paintMap((row, column) => scores[row][column]);
  describePair();
});

function drawMap() {
  scores = null;
  const [weights, T] = [weightsOf(state.layer, state.head), state.shown.ids.length];
  if (state.view === "weights") paintMap((row, column) => weights[row * T + column]);
  else loadScores();
}

function paintMap(value) {
  const { view, shown, position } = state;
  const T = shown.ids.length;
  if (!T) return;
  const isBlank = (row, column) => view !== "raw" && column > row;
  const cells = shown.ids.flatMap((_, row) =>
    shown.ids.map((_, column) => (isBlank(row, column) ? 0 : value(row, column))),
  );
  const most = view === "weights" ? 1 : highest(cells.map(Math.abs)) || 1;
  const color = (row, column) => {
    if (isBlank(row, column)) return null;
    const share = value(row, column) / most;
    return view === "weights" ? mix("negative", 0.04 + share) : diverging(share, "positive", "negative");
  };
  const room = Math.floor((find("#map").clientWidth - 28) / T);
  const cell = Math.max(T > 100 ? 4 : 10, Math.min(room, 32));
  map.draw({ columns: T, count: T * T, cell, color, labels: tokens() });
  map.point(position, keyPosition);
}

// What depends on the query position: arcs, the cursor of the map, and its description.
function drawQuery() {
  if (!state.run.attentions.length || !state.trace) return;
  keyPosition = Math.min(keyPosition, Math.max(0, state.shown.ids.length - 1));
  map.point(state.position, keyPosition);
  drawArcs();
  describePair();
}

function describePair() {
  const { layer, head, position, shown } = state;
  if (!shown.ids.length) return;
  const where = (i) => `${i + 1} ${quoted(tokenAt(i))}`;
  const weight = percent(weightsOf(layer, head)[position * shown.ids.length + keyPosition]);
  find("#pair").textContent =
    `Query ${where(position)}, key ${where(keyPosition)}: ` +
    (scores ? `score ${number(scores[position][keyPosition])}, ` : "") +
    (keyPosition > position
      ? "masked, because it is in the future."
      : `weight ${weight}. Click or press Enter to see how it is computed.`);
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Arcs from the query to the keys it attends to; a line's width is the attention weight.
function drawArcs() {
  const { layer, head, position, shown } = state;
  const T = shown.ids.length;
  const x = (i) => (i + 0.5) * STEP;
  const weights = rowOf(weightsOf(layer, head), T, position);
  const arcs = [...weights].map((weight, i) => {
    if (!(weight >= 0.005)) return "";
    const height = BASE - Math.min(96, 18 + 0.5 * STEP * (position - i));
    const [from, to] = i === position ? [x(i) + 10, x(i) - 10] : [x(position), x(i)];
    const d = `M${from} ${BASE}C${from} ${height} ${to} ${height} ${to} ${BASE}`;
    return svg("path", { d, "stroke-width": Math.max(0.5, 7 * weight), opacity: 0.35 + 0.65 * weight });
  });
  const texts = tokens().map((token, i) => {
    const text = svg("text", { x: x(i), y: BASE + 17, class: i === position ? "query" : "" }, glyph(token));
    text.onpointerenter = ({ pointerType }) => {
      if (pointerType !== "touch") select(i);
    };
    text.onclick = () => select(i);
    return text;
  });
  const best = weights.indexOf(highest(weights)) + 1;
  const label = `Layer ${layer}, head ${head}: position ${position + 1} attends most to position ${best}`;
  const box = find("#arcs");
  box.replaceChildren(
    svg("svg", { width: T * STEP, height: BASE + 26, role: "img", "aria-label": label }, ...arcs, ...texts),
  );
  if (!box.matches(":hover")) box.scrollLeft = x(position) - box.clientWidth / 2;
}

// Head scores. Those on the text need no computation; induction needs a text of its own.
const induction = new Map(); // by run and switches: a score for each layer and head

function drawHeadScores() {
  const columns = ["layer", "head", "previous character", "line start", "same character", "induction"];
  const [measured, marks] = [induction.get(inductionKey()), landmarks()];
  const rows = headButtons((layer, head, button) => {
    button.append(String(head));
    const cells = [...scoresOnText(weightsOf(layer, head), marks), measured?.[layer][head]].map((score) => {
      const words = score === undefined ? "…" : Number.isNaN(score) ? "–" : percent(score);
      const cell = h("td", { className: "number" }, words);
      cell.style.backgroundColor = mix("cold", score);
      return cell;
    });
    const row = h(
      "tr",
      { onclick: () => chooseHead(layer, head) },
      h("th", { scope: "row" }, String(layer)),
      h("td", {}, button),
      ...cells,
    );
    row.classList.toggle("struck", isHeadOff(layer, head));
    row.classList.toggle("chosen", button.getAttribute("aria-pressed") === "true");
    return row;
  });
  replaceAll(find("#scores"), [
    h("tr", {}, ...columns.map((each) => h("th", { scope: "col" }, each))),
    ...rows.flat(),
  ]);
  if (!measured) measureInduction();
}

// For each position of the text: where its line starts, and earlier copies of its character.
function landmarks() {
  const seen = new Map();
  let start = 0;
  return tokens().map((token, t) => {
    if (t && tokenAt(t - 1).endsWith("\n")) start = t;
    const copies = seen.get(token) ?? [];
    seen.set(token, [...copies, t]);
    return { start, copies };
  });
}

// Averages of a head's attention weights over the queries to which a score applies.
function scoresOnText(weights, marks) {
  const [previous, lineStart, same] = [[], [], []];
  marks.forEach(({ start, copies }, t) => {
    const row = rowOf(weights, marks.length, t);
    if (t) previous.push(row[t - 1]);
    if (start < t) lineStart.push(row[start]);
    if (copies.length) same.push(sum(copies.map((s) => row[s])));
  });
  return [previous, lineStart, same].map(mean);
}

const inductionKey = () => [state.run.index, ...[...state.run.off].sort()].join();

const measureInduction = latest(async (isStale) => {
  const { run } = state;
  const name = inductionKey();
  const once = shuffled(run.vocabulary.length).slice(0, Math.min(run.blockSize >> 1, 64));
  const N = once.length;
  const { attention } = await ask(run, "trace", { ids: [...once, ...once] });
  if (isStale() || name !== inductionKey()) return;
  // Position N + i has seen its token at i, so the one that followed is at i + 1.
  const score = (weights) => mean(once.slice(1).map((_, i) => weights[(N + i) * 2 * N + i + 1]));
  induction.set(
    name,
    attention.map((heads) => heads.map(score)),
  );
  drawHeadScores();
});

// The numbers below a limit, always in the same random order.
function shuffled(limit) {
  const numbers = [...Array(limit).keys()];
  let random = 1;
  for (let i = limit - 1; i > 0; i--) {
    random = (random * 48271) % 0x7fffffff; // Park and Miller's generator
    const j = random % (i + 1);
    [numbers[i], numbers[j]] = [numbers[j], numbers[i]];
  }
  return numbers;
}
