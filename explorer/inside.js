// The panels about the inside: the diagram with its switches, tracing a value, and the lens.

"use strict";

const TERMS = 8; // a sum shows its 8 largest products; one row adds up the others
const VECTORS = ["query", "key", "value", "scores", "weights", "heads", "out"]; // the vectors that attention shows
const GLOBAL_PARTS = {
  position_embedding: "position embedding",
  rope: "RoPE",
  skips: "skip connections",
  norms: "norms",
};
const SIGNS = { add: "+", mul: "×", sub: "−" };
const CELL = 18; // pixels of a number in a vector

let strip;
let vector = []; // what the strip shows

function startInside() {
  strip = new Grid(find("#vector"), "Vector at the selected position", describeCell, (row, column) =>
    followCell({ ...state.cell, channel: row * strip.columns + column }),
  );
  find("#earlier").onclick = () => select(state.position - 1);
  find("#later").onclick = () => select(state.position + 1);
  roving(find("#lens"), "td", showLensCell, () => state.shown.ids.length);
  find("#lens").onpointerover = ({ target }) => showLensCell(target.closest("td"));
  addEventListener("resize", () => {
    if (!state.trace) return;
    if (state.run.attentions.length) drawMap();
    follow();
  });
}

// The boxes of the diagram: consecutive steps of one module, such as a feed-forward network.
function unitsOf(run) {
  const units = [];
  run.steps.forEach((step, i) => {
    const path = step.module.split(".").filter(Boolean);
    const block = path[0] === "blocks" ? path.splice(0, 2).join(".") : "";
    const key = [block, path[0] ?? step.line].join(" ");
    if (units.at(-1)?.key !== key) units.push({ key, block, name: path[0] ?? "", steps: [] });
    units.at(-1).steps.push(i);
  });
  return units;
}

const inputsOf = (step) => ["x", "a", "b"].filter((name) => step[name]).map((name) => step[name]);

// The diagram is a grid with a row for each box. Frames of blocks and skip connections span rows.
function buildDiagram() {
  const { run } = state;
  state.cell ??= { step: run.steps.length - 1, name: "out", channel: null };
  const units = unitsOf(run);
  const placed = (element, row, last = row) => {
    element.style.gridRow = `${row + 2} / ${last + 3}`;
    return element;
  };
  const elements = units.flatMap((unit, u) => {
    const inputs = unit.steps
      .flatMap((i) => inputsOf(run.steps[i]))
      .map(({ step }) => units.findIndex(({ steps }) => steps.includes(step)));
    const box = placed(drawUnit(unit), u);
    box.classList.toggle("joined", !u || inputs.includes(u - 1));
    const isSkip = unit.steps.some((i) => run.steps[i].skip);
    const skips = inputs
      .filter((from) => from >= Math.max(0, u - 3) && from < u - 1)
      .map((from) => placed(h("div", { className: "skip", "data-parts": isSkip ? "skips" : "" }), from, u));
    const last = units.findLastIndex(({ block }) => block === unit.block);
    const isFirst = unit.block && unit.block !== units[u - 1]?.block;
    const frame = isFirst ? [placed(h("div", { className: "block quiet" }, unit.block), u, last)] : [];
    return [...frame, box, ...skips];
  });
  const ends = ["text", `logits of the next ${nounOf(run)}`].map((words) =>
    h("p", { className: "end" }, words),
  );
  find("#diagram").replaceChildren(placed(ends[0], -1), ...elements, placed(ends[1], units.length));
  const globals = run.parts.filter((part) => part in GLOBAL_PARTS);
  find("#switches").replaceChildren(...globals.map((part) => makeSwitch(part, GLOBAL_PARTS[part])));
}

// A box: its name and switch, a button for each step or each vector of attention, and the heads.
function drawUnit({ name, steps }) {
  const found = steps.map((i) => ({ i, ...state.run.steps[i] }));
  const isOne = found.length === 1 && found[0].kind !== "attention";
  const part = found.map((step) => step.part).find(Boolean);
  const buttons = found.flatMap((step) => {
    const vectors = VECTORS.filter((each) => each !== "out" || step.out);
    return step.kind === "attention"
      ? vectors.map((each) => stepButton(step, each, each))
      : [stepButton(step, "out", isOne && name ? name : nameOf(step, name))];
  });
  const heads = found
    .filter(({ kind }) => kind === "attention")
    .map((step) =>
      h(
        "span",
        { className: "heads" },
        "heads ",
        ...[...Array(step.heads).keys()].map((head) =>
          makeSwitch(`${step.module}.head ${head}`, String(head)),
        ),
      ),
    );
  const toggle = part ? [makeSwitch(part, "")] : [];
  const title = isOne
    ? []
    : [h("span", { className: "name" }, name), ...toggle, h("span", { className: "break" })];
  const parts = found.map(
    (step) => step.part ?? (step.skip ? "skips" : step.kind.endsWith("norm") ? "norms" : ""),
  );
  const box = h("div", { className: "unit" }, ...title, ...buttons, ...(isOne ? toggle : []), ...heads);
  box.dataset.parts = parts.join(" ");
  return box;
}

function nameOf(step, unit) {
  const last = step.module.split(".").at(-1);
  return step.kind === "linear" && last !== unit ? last : (SIGNS[step.kind] ?? step.kind);
}

function stepButton({ i, module }, name, words) {
  const button = h(
    "button",
    { type: "button", className: "step", "aria-label": `${module} ${words}` },
    words,
  );
  Object.assign(button.dataset, { step: i, name });
  button.onclick = () => followCell({ step: i, name, channel: null });
  return button;
}

function makeSwitch(part, words) {
  const { run } = state;
  const onclick = () => switchPart(run, part, run.off.has(part));
  return h(
    "button",
    { type: "button", role: "switch", className: "switch", "aria-label": part, "data-parts": part, onclick },
    words,
  );
}

// Which parts are off, and which step is selected.
function drawDiagram() {
  const { run, cell } = state;
  for (const each of all(".switch")) each.setAttribute("aria-checked", !run.off.has(each.dataset.parts));
  for (const each of all(".unit, .skip")) {
    each.classList.toggle(
      "struck",
      each.dataset.parts.split(" ").some((part) => run.off.has(part)),
    );
  }
  for (const each of all(".step")) {
    each.setAttribute("aria-pressed", +each.dataset.step === cell.step && each.dataset.name === cell.name);
  }
}

// Select a number: a channel of a step's output, at the selected position or another.
function followCell({ step, name, channel, position = state.position }) {
  const { run, trace } = state;
  if (!trace) return;
  state.cell = { step, name, channel };
  const [layer, heads] = [run.attentions.indexOf(run.steps[step]), run.steps[step].heads];
  const isOfHead = heads && channel !== null && ["query", "key", "value", "heads"].includes(name);
  const head = isOfHead ? headOf(run, step, channel) : Math.min(state.head, (heads ?? 1) - 1);
  if (heads && (layer !== state.layer || head !== state.head)) chooseHead(layer, head);
  drawDiagram();
  if (position !== state.position) select(position);
  else follow();
}

// The head to which a channel of queries, keys, values or head outputs belongs.
function headOf(run, index, channel) {
  const { heads, query } = run.steps[index];
  return Math.floor((channel * heads) / run.tensors[query][0]);
}

const isOfKeys = (name) => name === "scores" || name === "weights"; // a number for each key

const follow = latest(async (isStale) => {
  const { run, position, shown, cell } = state;
  if (!shown.ids.length) return;
  const values = await vectorOf(cell, position);
  if (isStale() || run !== state.run) return;
  const isLast = cell.step === run.steps.length - 1;
  const wanted = cell.channel ?? (isLast ? (shown.ids[position + 1] ?? ranking(values)[0] ?? 0) : 0);
  vector = [...values];
  const channel = Math.min(wanted, vector.length - 1); // a causal row has fewer keys earlier in the text
  const chosen = { ...cell, channel, position, value: vector[channel] };
  drawVector(chosen);
  const found = vector.length
    ? await explain(run, chosen)
    : { formula: "This part is switched off, so nothing is computed here." };
  if (!isStale() && run === state.run) drawExplanation(found);
});

async function vectorOf({ step, name }, position) {
  const { run, shown, layer, head } = state;
  const T = shown.ids.length;
  if (name === "weights") return rowOf(weightsOf(layer, head), T, position).slice(0, position + 1);
  if (name === "scores") return (await ask(run, "scores", { layer, head }))[position].slice(0, position + 1);
  return (await ask(run, "vectors", { step, position }))[name];
}

function drawVector({ step: index, name, channel, position }) {
  const { run } = state;
  const step = run.steps[index];
  const isAttention = step.kind === "attention";
  const kind = isAttention ? name : step.kind.replaceAll("_", " ");
  find("#vector-title").textContent = `Trace a value: ${step.module || "model"}, ${kind}`;
  find("#where").textContent = `Position ${position + 1} ${quoted(tokenAt(position))}`;
  find("#head-choice").hidden = !isOfKeys(name);
  const line = (isAttention && step.lines[step.lines[name] ? name : "projection"]) || step.line;
  find("#line").textContent = `${run.stage}.py, line ${line}:  ${run.source[line] ?? ""}`;
  const most = highest(vector.map(Math.abs)) || 1;
  const columns = Math.max(1, Math.min(vector.length, Math.floor(find("#vector").clientWidth / CELL)));
  const color = (row, column) => diverging(vector[row * columns + column] / most, "positive", "negative");
  strip.draw({ columns, count: vector.length, cell: CELL, color });
  describeCell(Math.floor(channel / columns), channel % columns);
}

function describeCell(row, column) {
  const { run, cell } = state;
  const i = row * strip.columns + column;
  const { heads } = run.steps[cell.step];
  strip.point(row, column);
  const label =
    cell.step === run.steps.length - 1
      ? quoted(run.vocabulary[i] ?? "")
      : isOfKeys(cell.name)
        ? `key ${i + 1} ${quoted(tokenAt(i) ?? "")}`
        : `${heads && cell.name !== "out" ? `head ${headOf(run, cell.step, i)}, ` : ""}[${i}]`;
  find("#cell").textContent =
    i in vector
      ? `${plural(vector.length, "value")}, largest magnitude ${number(highest(vector.map(Math.abs)))}. ${label}: ${number(vector[i])}`
      : "";
}

// How a number is computed: {formula, terms: [[label, left, right, from]], lines: [[label, value, from]]},
// where `from` is the cell that a number comes from.
async function explain(run, cell) {
  const step = run.steps[cell.step];
  const { name, channel, position, value } = cell;
  const lines = [["this value", value]];
  const head = name === "heads" && `${step.module}.head ${headOf(run, cell.step, channel)}`;
  const off = [step.part, head].some((part) => run.off.has(part));
  if (off) return { formula: "Switched off: the output is 0.", lines };
  if (name === "weights") return explainWeight(cell);
  if (name === "scores") return explainScore(run, cell);
  if (["attention", "linear"].includes(step.kind)) return explainProducts(run, cell);
  if (step.table) {
    const row = step.kind === "token" ? `the row of ${quoted(tokenAt(position))}` : `row ${position}`;
    return { formula: `Looked up in ${step.table}: ${row}, column ${channel}.`, lines };
  }
  const at = position - (step.kind === "shift");
  const inputs = await Promise.all(inputsOf(step).map((input) => numberOf(run, input, at, channel)));
  if (step.kind.endsWith("norm")) return explainNorm(run, cell, inputs[0]);
  const formulas = {
    add: "a + b",
    mul: "a × b",
    sub: "a − b",
    shift: "the same channel of the previous position",
  };
  const isCut = step.skip && run.off.has("skips");
  const formula = isCut
    ? "The skip connection is off: this is the sublayer's output."
    : (formulas[step.kind] ?? `${step.kind}(x)`);
  return { formula, lines: [...inputs, ...lines] };
}

// One number of an input, as a line of an explanation.
async function numberOf(run, input, position, channel) {
  if ("number" in input) return ["number", input.number];
  if (position < 0) return ["no earlier position", 0];
  const values =
    "tensor" in input
      ? await ask(run, "numbers", { tensor: input.tensor })
      : (await ask(run, "vectors", { step: input.step, position })).out;
  const i = channel % values.length; // one number may belong to all channels
  if ("tensor" in input) return [`${input.tensor}[${i}]`, values[i]];
  const { module, kind } = run.steps[input.step];
  return [`${module || kind}[${i}]`, values[i], { step: input.step, name: "out", channel: i, position }];
}

// A sum of products: x · weight + bias, or for a head's output, attention weights · values.
async function explainProducts(run, { step: index, name, channel, position, value }) {
  const step = run.steps[index];
  const isOut = step.kind === "attention" && name === "out";
  const {
    x,
    weights,
    bias,
    first = 0,
  } = await ask(run, "products", { step: index, name, position, channel });
  const terms = [...x].map((left, i) => {
    if (name !== "heads")
      return [
        `x[${i}]`,
        left,
        weights[i],
        { step: isOut ? index : step.x.step, name: isOut ? "heads" : "out", channel: i },
      ];
    const from = { step: index, name: "value", channel, position: first + i };
    return [`key ${first + i + 1} ${quoted(tokenAt(first + i))}`, left, weights[i], from];
  });
  const total = sum(terms.map(([, left, right]) => left * right)) + bias;
  const changes = [
    step.norm_eps && !run.off.has("norms") && "RMSNorm",
    step.frequencies && !run.off.has("rope") && "RoPE",
  ].filter(Boolean);
  const isChanged = changes.length && ["query", "key"].includes(name);
  const lines = [...(bias ? [["bias", bias]] : []), ["total", isChanged ? total : value]];
  if (isChanged) lines.push([`after ${changes.join(" and ")}`, value]);
  const formula =
    name === "heads"
      ? "Σ attention weight × value"
      : `Σ x[i] × weight[${channel}, i]${bias ? " + bias" : ""}`;
  return { formula, terms, lines };
}

// q·k / √D: the terms of one head.
async function explainScore(run, { step: index, channel, position, value }) {
  const { head } = state;
  const at = (where) => ask(run, "vectors", { step: index, position: where });
  const [{ query }, { key }] = await Promise.all([at(position), at(channel)]);
  const D = query.length / run.steps[index].heads;
  const terms = [...rowOf(query, D, head)].map((left, d) => [
    `q[${d}] · k[${d}]`,
    left,
    key[head * D + d],
    { step: index, name: "query", channel: head * D + d },
  ]);
  const lines = [
    ["q · k", sum(terms.map(([, left, right]) => left * right))],
    [`divided by √${D} = ${number(Math.sqrt(D), 2)}`, value],
  ];
  return { formula: `q·k / √D for query ${position + 1}, key ${channel + 1}, head ${head}`, terms, lines };
}

// Softmax: exp of this score, divided by the sum over all keys that are not masked.
async function explainWeight({ step, channel, position, value }) {
  const scores = await vectorOf({ step, name: "scores" }, position);
  const most = highest(scores);
  const odds = [...scores].map((score) => Math.exp(score - most));
  const lines = [
    ["score", scores[channel], { step, name: "scores", channel }],
    [`exp(score − ${number(most)})`, odds[channel]],
    [`sum over ${plural(odds.length, "key")}`, sum(odds)],
    ["weight = exp / sum", value],
  ];
  const formula = `Softmax over the keys that query ${position + 1} sees; subtracting the largest score changes no weight`;
  return { formula, lines };
}

async function explainNorm(run, { step: index, channel, position, value }, input) {
  const step = run.steps[index];
  if (run.off.has("norms")) return { formula: "Norms are off: the vector passes unchanged.", lines: [input] };
  const { out: x } = await ask(run, "vectors", { step: step.x.step, position });
  const isCentered = step.kind === "layer_norm";
  const center = isCentered ? mean(x) : 0;
  const scale = Math.sqrt(mean([...x].map((each) => (each - center) ** 2)) + step.eps);
  const affine = ["weight", "bias"].filter((name) => step[name]);
  const numbers = await Promise.all(
    affine.map((name) => numberOf(run, { tensor: step[name] }, position, channel)),
  );
  const lines = [
    input,
    ...(isCentered ? [["mean of x", center]] : []),
    [isCentered ? "standard deviation of x" : "RMS of x", scale],
  ];
  const formula =
    (isCentered ? "(x − mean) / standard deviation" : "x / RMS") +
    (step.weight ? " × weight" : "") +
    (step.bias ? " + bias" : "");
  return { formula, lines: [...lines, ...numbers, ["this value", value]] };
}

function drawExplanation({ formula, terms = [], lines = [] }) {
  const row = (label, product, value, from, className = "") => {
    const button = from
      ? h("button", { type: "button", className: "from", onclick: () => followCell(from) }, label)
      : label;
    const cells = [product, number(value)].map((words) => h("td", { className: "number" }, words));
    return h("tr", { className }, h("th", { scope: "row" }, button), ...cells);
  };
  const products = terms.map(([, left, right]) => left * right);
  const order = ranking(products.map(Math.abs));
  const rest = order.slice(TERMS);
  const remainder = rest.length
    ? [[`the other ${plural(rest.length, "term")}`, sum(rest.map((i) => products[i]))]]
    : [];
  const rows = order.slice(0, TERMS).map((i) => {
    const [label, left, right, from] = terms[i];
    return row(label, `${number(left)} × ${number(right)}`, products[i], from);
  });
  rows.push(...[...remainder, ...lines].map(([label, value, from]) => row(label, "", value, from, "line")));
  find("#explanation").replaceChildren(h("p", {}, formula), h("table", {}, ...rows));
}

const lensAt = (layer, position) =>
  softmax(rowOf(state.trace.lens[layer], state.run.vocabulary.length, position));

// The logit lens: a row for each layer, a column for each position.
function drawLens() {
  const { run, shown } = state;
  const box = find("#lens");
  const labels = (words, row) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, words),
      ...row.map((token) => h("th", { scope: "col" }, h("bdi", {}, glyph(token)))),
    );
  const body = run.layers.map(({ name }, layer) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, name),
      ...shown.ids.map((_, i) => {
        const probabilities = lensAt(layer, i);
        const best = ranking(probabilities)[0];
        const cell = h(
          "td",
          { tabIndex: -1, "data-i": i, "data-layer": layer },
          h("bdi", {}, glyph(run.vocabulary[best])),
        );
        cell.classList.toggle("right", best === shown.ids[i + 1]);
        cell.style.backgroundColor = mix("cold", probabilities[best]);
        return cell;
      }),
    ),
  );
  const focused = all("td", box).indexOf(document.activeElement);
  box.replaceChildren(labels("text", tokens()), ...body, labels("actual next", [...tokens().slice(1), ""]));
  const cells = all("td", box);
  if (cells.length) (cells[focused] ?? cells[0]).tabIndex = 0;
  cells[focused]?.focus({ preventScroll: true });
}

function drawLensColumn() {
  for (const each of all("#lens td")) each.classList.toggle("here", +each.dataset.i === state.position);
}

function showLensCell(cell) {
  if (!cell || !state.trace) return;
  const { run, shown } = state;
  const [i, layer] = [+cell.dataset.i, +cell.dataset.layer];
  const probabilities = lensAt(layer, i);
  const best = ranking(probabilities).slice(0, 5);
  const words = (id) => `${quoted(run.vocabulary[id])} ${percent(probabilities[id])}`;
  const target = shown.ids[i + 1];
  const truth =
    target === undefined || best.includes(target) ? "" : `; the actual next ${nounOf(run)}, ${words(target)}`;
  find("#lens-cell").textContent =
    `${run.layers[layer].name}, position ${i + 1} ${quoted(tokenAt(i))}: ${best.map(words).join(", ")}${truth}`;
}
