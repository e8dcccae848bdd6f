// The page: its state, the worker that computes, and functions for tests and the console.
//
// All panels are drawn from one state. When the text, the model or its parts change, `refresh`
// computes everything again; when only the selected position changes, `drawSelection` is enough.
// Tokens are in tokens.js; the panels are in text.js, attention.js and inside.js.

"use strict";

const find = (selector) => document.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

const runs = JSON.parse(find("#models").textContent).map((about, index) => ({
  ...about, // steps, parts, layers, blockSize, vocabulary, …, as explore.py describes them
  index,
  off: new Set(), // the parts that are switched off
  ...tokensOf(about),
  attentions: about.steps.filter((step) => step.kind === "attention"),
}));

const state = {
  run: runs[0],
  text: "",
  past: [], // earlier texts, for undo
  shown: { ids: [], start: 0 }, // the tokens that fit the context, and how many are before them
  trace: null, // what the worker computed for them
  position: Infinity, // the selected one of them; at first the last
  layer: 0,
  head: 0,
  view: "weights",
  cell: null, // the number to follow: {step, name, channel}
  playing: null,
};

// Elements, made without HTML, so that no text of a run can be taken for markup.
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// How a token looks where it stands alone: a sign for what is invisible, a circle that carries a
// combining mark, and the code of other characters without a picture.
function glyph(token) {
  const signs = { "\n": "⏎", " ": "·", "\t": "⇥", "\r": "␍" };
  const shown = [...token].map((each) => {
    if (each in signs) return signs[each];
    if (!/[\p{C}\p{Z}]/u.test(each)) return each;
    const code = each.codePointAt(0).toString(16).toUpperCase();
    return /\p{Cs}/u.test(each) ? `‹${code.slice(2)}›` : `U+${code}`; // a byte, see tokens.js
  });
  return (/^\p{M}/u.test(token) ? "◌" : "") + shown.join("");
}

const quoted = (token) => `“\u2068${glyph(token)}\u2069”`; // its direction affects nothing around it

function number(value, digits = 3) {
  if (!Number.isFinite(value)) return String(value).replace("Infinity", "∞");
  const isTiny = value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits;
  return (isTiny ? value.toExponential(1) : value.toFixed(digits)).replaceAll("-", "−");
}

const percent = (p) => (p > 0 && p < 0.0005 ? "< 0.1%" : `${number(100 * p, 1)}%`);
const plural = (count, noun) => `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
const bits = (nats) => nats / Math.LN2;
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const mean = (numbers) => sum(numbers) / numbers.length;
const highest = (numbers) => numbers.reduce((a, b) => Math.max(a, b), -Infinity);
const ranking = (numbers) => [...numbers.keys()].sort((a, b) => numbers[b] - numbers[a]);
const rowOf = (matrix, width, i) => matrix.subarray(i * width, (i + 1) * width);

// Colors come from the style sheet, which knows the theme.
const theme = {};
function readTheme() {
  const css = getComputedStyle(document.documentElement);
  for (const name of ["background", "quiet", "heat", "cold", "positive", "negative"]) {
    const hex = css.getPropertyValue(`--${name}`).trim();
    theme[name] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }
}

function mix(name, share) {
  const part = Math.max(0, Math.min(share || 0, 1));
  return `rgb(${theme.background.map((from, i) => Math.round(from + part * (theme[name][i] - from))).join(", ")})`;
}

const diverging = (x, above, below) => mix(x < 0 ? below : above, Math.abs(x));

// The worker computes; the page asks it and waits for the answer with the same id.
const worker = startWorker();
const waiting = new Map();
let lastId = 0;

function startWorker() {
  const code = ["#model", "#worker"].map((name) => find(name).textContent).join("\n");
  const made = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  made.onmessage = ({ data: { id, result, error } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(result);
  };
  made.onerror = (event) => {
    find("#loss").textContent = `The worker failed: ${event.message}`;
  };
  return made;
}

function ask(run, call, more = {}) {
  lastId += 1;
  worker.postMessage({
    call,
    id: lastId,
    model: run.index,
    ids: state.shown.ids,
    off: [...run.off],
    ...more,
  });
  return new Promise((resolve, reject) => waiting.set(lastId, { resolve, reject }));
}

// Work that is asked for again while it runs: it runs once more, and drops the stale answer.
function latest(work) {
  let [running, isStale] = [null, false];
  const repeat = async () => {
    try {
      do {
        isStale = false;
        await work(() => isStale);
      } while (isStale);
    } finally {
      running = null;
    }
  };
  return () => {
    if (running) isStale = true;
    else running = repeat();
    return running;
  };
}

const nounOf = (run) => (run.merges ? "token" : "character");
const tokenAt = (position) => state.run.vocabulary[state.shown.ids[position]];
const tokens = () => state.shown.ids.map((_, i) => tokenAt(i));

// Compute everything that depends on the text, the model and its parts.
const refresh = latest(async (isStale) => {
  const { run, text } = state;
  const { ids } = encode(run, text);
  const shown = { ids: ids.slice(-run.blockSize), start: Math.max(0, ids.length - run.blockSize) };
  const trace = await ask(run, "trace", { ids: shown.ids });
  if (isStale()) return;
  const position = Math.max(0, Math.min(state.position, shown.ids.length - 1));
  Object.assign(state, { trace, shown, position });
  drawText();
  drawAttention();
  drawLens();
  drawDiagram();
  drawSelection();
  predict();
  if (!state.playing) compare();
  await showLoss(isStale);
});

// The selection follows the pointer, so this is only what depends on it.
function drawSelection() {
  drawAlternatives();
  drawQuery();
  drawLensColumn();
  follow();
}

function select(position) {
  if (!state.trace || position === state.position || !(position in state.shown.ids)) return;
  state.position = position;
  drawSelection();
}

// Per character, also if a token has several.
function meanLoss(losses) {
  const { run, shown } = state;
  return sum(losses.slice(1)) / [...decode(run, shown.ids.slice(1))].length;
}

async function showLoss(isStale) {
  const { run, shown, trace } = state;
  const loss = meanLoss(trace.losses);
  let words = `Loss ${number(loss)} nats (${number(bits(loss))} bits) per character`;
  if (shown.ids.length < 2) words = `The loss needs at least two ${nounOf(run)}s`;
  else if (run.off.size) {
    const change = loss - meanLoss(await ask(run, "losses", { off: [] }));
    if (isStale()) return;
    words += `, ${change < 0 ? "" : "+"}${number(change)} nats with ${plural(run.off.size, "part")} off`;
  }
  find("#loss").textContent = words;
  find("#reset").disabled = !run.off.size;
}

function switchPart(run, part, isOn) {
  if (!run.parts.includes(part)) throw new Error(`${run.name} has no part ${part}`);
  run.off[isOn ? "delete" : "add"](part);
  drawDiagram();
  return refresh();
}

// Another model reads the same text, without the characters that it does not know.
function chooseRun(run) {
  stop();
  const { ids, unknown } = encode(run, state.text);
  Object.assign(state, {
    run,
    layer: 0,
    head: 0,
    cell: null,
    trace: null,
    position: Infinity,
    text: decode(run, ids),
  });
  find("#input").value = state.text;
  refuse(unknown);
  drawRun();
  refresh();
}

// What depends on the model only. Panels about parts that it lacks are absent.
function drawRun() {
  const { run } = state;
  find("#title").textContent = `Explore ${run.name}`;
  find("#facts").textContent =
    `${run.stage}.py, ${plural(run.parameters, "parameter")}, context of ${plural(run.blockSize, nounOf(run))}; ` +
    `trained on ${run.corpus} for ${plural(run.step, "step")}, validation loss ${number(run.valLoss)}.`;
  find("#attention-panel").hidden = find("#heads-panel").hidden = !run.attentions.length;
  find("#lens-panel").hidden = !run.layers.length;
  find("#compare-panel").hidden = runs.length < 2;
  for (const each of all(".has-parts")) each.hidden = !run.parts.length;
  find("#panels").replaceChildren(
    ...all("section:not([hidden])").map((panel) =>
      h("a", { href: `#${panel.id}` }, panel.querySelector("h2").textContent),
    ),
  );
  drawLegend();
  drawControls();
  drawHeadChoices();
  buildDiagram();
}

// One stop for the Tab key; from there, the arrow keys move. A row has `columns` items.
function roving(box, selector, choose, columns = () => 1) {
  box.addEventListener("focusin", ({ target }) => {
    if (target.matches(selector)) choose(target);
  });
  box.addEventListener("keydown", (event) => {
    const items = all(selector, box);
    const from = items.indexOf(document.activeElement);
    const [up, down] = [from - columns(), from + columns()];
    const to = {
      ArrowLeft: from - 1,
      ArrowRight: from + 1,
      ArrowUp: up,
      ArrowDown: down,
      Home: 0,
      End: items.length - 1,
    };
    const target = items[to[event.key]];
    if (!target) return;
    event.preventDefault();
    for (const each of items) each.tabIndex = each === target ? 0 : -1;
    target.focus();
  });
}

// For tests, and for the console: the models, and what they compute of any text.
function publish(loaded) {
  const models = runs.map(({ name, stage, vocabulary, blockSize, attentions, parts }) => ({
    name,
    stage,
    vocabulary,
    blockSize,
    layers: attentions.length,
    heads: attentions[0]?.heads ?? 0,
    parts,
  }));
  const runOf = (model) => runs[models.indexOf(model)];
  const idsOf = (run, text) => {
    const { ids, unknown } = encode(run, text);
    if (unknown.length) throw new Error(`${run.name} does not know ${unknown.join(" ")}`);
    return ids;
  };
  const rows = (matrix, width) =>
    Array.from({ length: matrix.length / width }, (_, i) => [...rowOf(matrix, width, i)]);
  window.explorer = {
    models,
    ready: loaded.then(refresh),
    async trace(model, text) {
      const run = runOf(model);
      const ids = idsOf(run, text).slice(-run.blockSize);
      const found = await ask(run, "trace", { ids });
      const V = run.vocabulary.length;
      return {
        attention: found.attention.map((heads) => heads.map((matrix) => rows(matrix, ids.length))),
        lens: found.lens.map((matrix) => rows(matrix, V)),
        losses: found.losses,
        logits: rows(found.logits, V),
      };
    },
    logits: async (model, text) => (await explorer.trace(model, text)).logits.at(-1),
    off: (model, part) => switchPart(runOf(model), part, false),
    on: (model, part) => switchPart(runOf(model), part, true),
    async generate(model, text, count, settings = {}) {
      const [run, added] = [runOf(model), []];
      for await (const id of continuation(run, idsOf(run, text), count, settings)) added.push(id);
      return decode(run, added);
    },
  };
}

function start() {
  readTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readTheme();
    drawRun();
    refresh();
  });
  for (const name of ["#model-choice", "#other-choice"]) {
    find(name).append(...runs.map((run) => h("option", { value: run.index }, run.name)));
  }
  find("#model-choice").onchange = ({ target }) => chooseRun(runs[target.value]);
  find("#reset").onclick = () => {
    state.run.off.clear();
    refresh();
  };
  // The longest beginning, of what the first model can read: a short context cuts its own.
  const longest = runs.map((run) => run.passage).reduce((a, b) => (b.length > a.length ? b : a));
  state.text = find("#input").value = decode(runs[0], encode(runs[0], longest).ids);
  startText();
  startAttention();
  startInside();
  drawRun();
  publish(ask(runs[0], "load", { models: runs, weights: all(".weights").map((each) => each.textContent) }));
}

addEventListener("unhandledrejection", ({ reason }) => {
  find("#loss").textContent = String(reason);
});
addEventListener("DOMContentLoaded", start);
