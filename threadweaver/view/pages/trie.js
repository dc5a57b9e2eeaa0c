// The trie of a trajectory. Token j is i or an ancestor of i iff j <= i < ends[j]: that is all this
// page knows of the mask.

const about = read("about");
const texts = read("texts");
const tokens = ints(read("tokens"));
const ids = ints(read("ids"));
const ends = ints(read("ends"));
const sampled = read("sampled") ? ints(read("sampled")) : null;
const rowPtr = ints(read("row_ptr"));
const fullEnd = ints(read("full_end"));
const kvBlocks = ints(read("kv_blocks"));
const N = about.tokens;
const NONE = 0, FULL = 1, PARTIAL = 2;

// ---- the shape

const depth = new Int32Array(N);
const parent = new Int32Array(N);
{
  const path = [];
  for (let i = 0; i < N; i++) {
    while (path.length && ends[path.at(-1)] <= i) path.pop();
    parent[i] = path.length ? path.at(-1) : -1;
    depth[i] = path.length;
    path.push(i);
  }
}

// ---- lines of the list: first token, its end, level of branching, whether a node begins

const INDENT = 14, MOST_LEVELS = 24, GUTTER = 100;
let lines = [];

/** Breaks the tokens into lines for a width in pixels. */
function breakLines(width) {
  const probe = make("span", "t", "0".repeat(100));
  const row = make("div", "row", null, probe);
  row.style.cssText = "position:absolute;visibility:hidden";
  $("tokens").append(row);
  const letter = probe.getBoundingClientRect().width / 100 || 7.5;
  row.remove();
  const widths = texts.map((text) => {
    let n = 0;
    for (const sign of text) n += sign.codePointAt(0) > 0x2e7f ? 2 : 1;
    return n || 1;
  });
  const ended = texts.map((text) => text.endsWith("\n"));
  const branches = [];
  let used = 0, line = null;
  lines = [];
  for (let i = 0; i < N; i++) {
    // A node is a run in which every token is the only child of the one before it.
    const begins = i === 0 || ends[i] !== ends[i - 1];
    if (begins) {
      while (branches.length && ends[branches.at(-1)] <= i) branches.pop();
      branches.push(i);
    }
    const level = branches.length - 1;
    const room = Math.max(16, Math.floor((width - GUTTER - INDENT * Math.min(level, MOST_LEVELS)) / letter));
    if (begins || used + widths[tokens[i]] > room || ended[tokens[i - 1]]) {
      line = { from: i, to: i, level, begins };
      lines.push(line);
      used = 0;
    }
    line.to = i + 1;
    used += widths[tokens[i]];
  }
}
const lineOf = (i) => {
  let low = 0, high = lines.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (lines[middle].from <= i) low = middle;
    else high = middle - 1;
  }
  return low;
};

// Which block of the schedule holds a pair.
const queryBlocks = fullEnd.length;
const keyBlocks = Math.ceil(N / about.block_kv);
const kinds = new Uint8Array(queryBlocks * keyBlocks);
for (let q = 0; q < queryBlocks; q++) {
  for (let at = rowPtr[q]; at < rowPtr[q + 1]; at++) {
    kinds[q * keyBlocks + kvBlocks[at]] = at < fullEnd[q] ? FULL : PARTIAL;
  }
}
const kindOf = (q, k) => kinds[Math.floor(q / about.block_q) * keyBlocks + Math.floor(k / about.block_kv)];

// ---- tokens

const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍" };
let lit = new Int32Array(0); // the token that is looked at and its ancestors, ascending
const isLit = new Uint8Array(N);
let self = -1, pinned = -1;

const list = new VirtualList($("tokens"), 20, (row, number) => {
  const { from, to, level, begins } = lines[number];
  if (begins) row.classList.add("first");
  row.append(make("span", "at", count(from)));
  const line = make("span", "line");
  line.style.marginLeft = `${INDENT * Math.min(level, MOST_LEVELS)}px`;
  for (let i = from; i < to; i++) {
    const text = texts[tokens[i]];
    const span = make("span", "t");
    span.dataset.i = i;
    if (/[\n\t\r]/.test(text)) {
      for (const piece of text.split(/([\n\t\r])/)) if (piece) span.append(SIGNS[piece] ? make("span", "sign", SIGNS[piece]) : piece);
    } else span.textContent = text || "∅";
    paint(span, i);
    line.append(span);
  }
  row.append(line);
});

function paint(span, i) {
  span.classList.toggle("lit", isLit[i] === 1);
  span.classList.toggle("self", i === self);
  span.classList.toggle("forced", sampled !== null && !sampled[i]);
}

/** Lights token i and its ancestors, by the ends alone; none for -1. */
function light(i) {
  if (i === self) return;
  for (const j of lit) isLit[j] = 0;
  const found = [];
  for (let j = 0; j <= i; j++) if (i < ends[j]) found.push(j);
  lit = Int32Array.from(found);
  for (const j of lit) isLit[j] = 1;
  self = i;
  for (const row of list.shown.values()) {
    for (const span of row.querySelectorAll(".t")) paint(span, Number(span.dataset.i));
  }
  describe();
  drawMask();
}

function describe() {
  const box = $("token");
  if (self < 0) {
    box.replaceChildren(make("span", "muted", "Point at a token: it and its ancestors, all that it sees, light up. A click keeps it."));
    return;
  }
  const q = Math.floor(self / about.block_q);
  const full = fullEnd[q] - rowPtr[q], partial = rowPtr[q + 1] - fullEnd[q];
  const facts = [`depth ${count(depth[self])}`, `sees ${plural(lit.length, "token")}`, `seen by tokens ${count(self)} to ${count(ends[self] - 1)}`];
  if (sampled) facts.push(sampled[self] ? "completed by a call" : "context only");
  box.replaceChildren(
    make("strong", "", `Token ${count(self)} `),
    make("span", "", `${JSON.stringify(texts[tokens[self]])} (id ${ids[tokens[self]]})`),
    make("span", "muted", facts.join(" · ")),
    make("span", "muted", `query block ${count(q)} meets ${count(full)} full and ${count(partial)} partial key blocks`),
  );
}

// ---- the mask

const canvas = $("mask");
const whole = () => ({ q: 0, k: 0, span: N });
let view = whole(); // the first row and column in sight, and how many of each

function parts(name) {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = colour(name);
  probe.fillRect(0, 0, 1, 1);
  return probe.getImageData(0, 0, 1, 1).data;
}

let picture = null; // the mask of this view, without what is lit

function paintMask() {
  const size = Math.max(1, Math.round(canvas.clientWidth * Math.min(devicePixelRatio, 2)));
  canvas.width = canvas.height = size;
  const scale = size / view.span;
  const cover = new Float32Array(size * (size + 1));
  for (let x = 0; x < size; x++) {
    const first = Math.floor(view.k + x / scale);
    const end = Math.min(N, Math.max(first + 1, Math.floor(view.k + (x + 1) / scale)));
    const weight = 1 / Math.max(1, end - first);
    const column = x * (size + 1);
    for (let j = Math.max(0, first); j < end; j++) {
      // Rows [j, ends[j]) see column j. Edges within a pixel count for their part of it.
      const from = Math.max(0, (j - view.q) * scale), to = Math.min(size, (ends[j] - view.q) * scale);
      if (to <= from) continue;
      for (const [edge, sign] of [[from, weight], [to, -weight]]) {
        const y = Math.floor(edge), rest = edge - y;
        cover[column + y] += sign * (1 - rest);
        if (y < size) cover[column + y + 1] += sign * rest;
      }
    }
  }
  const image = new ImageData(size, size);
  const tones = { [NONE]: [parts("paper"), parts("ink")], [FULL]: [parts("paper"), parts("bar")], [PARTIAL]: [parts("critical-soft"), parts("critical")] };
  const outside = parts("raised");
  for (let x = 0; x < size; x++) {
    const k = Math.floor(view.k + (x + 0.5) / scale);
    let sum = 0;
    for (let y = 0; y < size; y++) {
      sum += cover[x * (size + 1) + y];
      const q = Math.floor(view.q + (y + 0.5) / scale);
      const at = 4 * (y * size + x);
      const inside = q >= 0 && k >= 0 && q < N && k < N;
      const [low, high] = inside ? tones[kindOf(q, k)] : [outside, outside];
      const share = Math.max(0, Math.min(1, sum));
      for (let c = 0; c < 3; c++) image.data[at + c] = low[c] + (high[c] - low[c]) * share;
      image.data[at + 3] = 255;
    }
  }
  picture = image;
  $("window").textContent = view.span >= N ? `all ${count(N)} rows and columns` : `rows from ${count(Math.max(0, view.q))}, columns from ${count(Math.max(0, view.k))}: ${count(view.span)} of each`;
  drawMask();
}

function drawMask() {
  if (!picture) return;
  const context = canvas.getContext("2d");
  context.putImageData(picture, 0, 0);
  const size = canvas.width, scale = size / view.span;
  if (about.block_q * scale > 20 * devicePixelRatio) {
    context.strokeStyle = colour("rule");
    context.lineWidth = 1;
    context.beginPath();
    for (let q = Math.ceil(view.q / about.block_q) * about.block_q; q < view.q + view.span; q += about.block_q) {
      const y = Math.round((q - view.q) * scale) + 0.5;
      context.moveTo(0, y), context.lineTo(size, y);
    }
    for (let k = Math.ceil(view.k / about.block_kv) * about.block_kv; k < view.k + view.span; k += about.block_kv) {
      const x = Math.round((k - view.k) * scale) + 0.5;
      context.moveTo(x, 0), context.lineTo(x, size);
    }
    context.stroke();
  }
  if (self < 0) return;
  // The row of the token that is looked at: what it sees, in ink.
  const thick = Math.max(3 * devicePixelRatio, scale), y = (self - view.q + 0.5) * scale - thick / 2;
  context.fillStyle = colour("paper");
  context.fillRect(0, y - devicePixelRatio, size, thick + 2 * devicePixelRatio);
  context.fillStyle = colour("ink");
  for (const [from, to] of runs(lit)) {
    context.fillRect((from - view.k) * scale, y, Math.max(1, (to - from) * scale), thick);
  }
}

function* runs(sorted) {
  for (let i = 0, from; i < sorted.length; i++) {
    if (i === 0 || sorted[i] !== sorted[i - 1] + 1) from = sorted[i];
    if (i === sorted.length - 1 || sorted[i + 1] !== sorted[i] + 1) yield [from, sorted[i] + 1];
  }
}

function pairAt(event) {
  const box = canvas.getBoundingClientRect(), scale = box.width / view.span;
  return [Math.floor(view.q + (event.clientY - box.top) / scale), Math.floor(view.k + (event.clientX - box.left) / scale)];
}

/** Zooms by a factor about a pair, which stays where it is. */
function zoom(factor, q = view.q + view.span / 2, k = view.k + view.span / 2) {
  const span = Math.min(N, Math.max(Math.min(N, 16), view.span * factor));
  const part = span / view.span;
  move(q - (q - view.q) * part, k - (k - view.k) * part, span);
}

function move(q, k, span = view.span) {
  const keep = (at) => Math.max(0, Math.min(N - span, at));
  view = { q: keep(q), k: keep(k), span };
  schedule();
}

let waiting = false;
function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    paintMask();
  });
}

// ---- what is pointed at

// A browser also says so when the page moves beneath a pointer at rest: keys would then do nothing.
let pointer = "";
$("tokens").addEventListener("mouseover", (event) => {
  const place = `${event.clientX} ${event.clientY}`;
  if (place === pointer) return;
  pointer = place;
  const span = event.target.closest(".t");
  if (span) light(Number(span.dataset.i));
});
$("tokens").addEventListener("mouseleave", () => light(pinned));
$("tokens").addEventListener("click", (event) => {
  const span = event.target.closest(".t");
  if (span) pinned = Number(span.dataset.i);
});
let drag = null;
canvas.addEventListener("pointerdown", (event) => {
  drag = { x: event.clientX, y: event.clientY, view, moved: false };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  const [q, k] = pairAt(event);
  if (drag && Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 3) drag.moved = true;
  if (drag?.moved) {
    const scale = canvas.clientWidth / view.span;
    move(drag.view.q - (event.clientY - drag.y) / scale, drag.view.k - (event.clientX - drag.x) / scale);
  } else if (q >= 0 && q < N && k >= 0 && k < N) {
    const kind = ["skipped block", "full block", "partial block"][kindOf(q, k)];
    canvas.title = `query ${count(q)} ${JSON.stringify(texts[tokens[q]])}, key ${count(k)} ${JSON.stringify(texts[tokens[k]])}: ${k <= q && q < ends[k] ? "visible" : "hidden"}, ${kind}`;
  }
});
canvas.addEventListener("pointerup", (event) => {
  const [q] = pairAt(event);
  if (!drag?.moved && q >= 0 && q < N) pin(q);
  drag = null;
});
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(event.deltaY / 400), ...pairAt(event));
}, { passive: false });
$("in").onclick = () => zoom(0.5);
$("out").onclick = () => zoom(2);
$("whole").onclick = () => move(0, 0, N);

function pin(i) {
  pinned = i;
  light(i);
  if (i >= 0) list.reveal(lineOf(i));
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const child = self >= 0 && ends[self] > self + 1 ? self + 1 : self;
  const to = { ArrowRight: Math.min(N - 1, self + 1), ArrowLeft: Math.max(0, self - 1), ArrowUp: self > 0 ? Math.max(0, parent[self]) : self, ArrowDown: child, Escape: -1 }[event.key];
  if (to === undefined) return;
  pin(to);
  event.preventDefault();
});

// ---- start

$("file").textContent = about.title;
$("totals").textContent = `${plural(N, "token")} · ${plural(about.paths, "path")} · longest path ${count(about.longest)}`;
for (const [name, value] of [
  ["visible pairs", `${count(about.visible)} (${percent(about.visible / N ** 2)} of all)`],
  ["computed pairs", `${count(about.computed)} (${(about.computed / about.visible).toFixed(2)} for each visible one)`],
  ["blocks", `${about.block_q} × ${about.block_kv}: ${count(about.full)} full, ${count(about.partial)} partial, ${count(queryBlocks * keyBlocks - about.full - about.partial)} skipped`],
]) $("figures").append(make("dt", "", name), make("dd", "", value));
for (const [name, text] of [["bar", "full block: no mask needed"], ["critical", "partial block: visible"], ["critical-soft", "partial block: computed, hidden"], ["paper", "skipped"]]) {
  const swatch = make("i");
  swatch.style.background = `var(--${name})`;
  $("legend").append(make("li", "", null, swatch, text));
}
describe();
new ResizeObserver(([{ contentRect }]) => {
  const top = lines.length ? lines[Math.min(lines.length - 1, Math.floor(list.box.scrollTop / list.height))].from : 0;
  breakLines(contentRect.width);
  list.reset(lines.length);
  list.box.scrollTop = lineOf(top) * list.height;
}).observe($("tokens"));
new ResizeObserver(schedule).observe(canvas);
startTheme(paintMask);
ready();
