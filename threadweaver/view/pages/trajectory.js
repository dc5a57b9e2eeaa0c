// Rows of trajectories. Rows count from 1 wherever a person sees them, from 0 in here.

const about = read("about");
const index = read("index");
const chunks = new Map();
const TAG = /(<\/?(?:Parallel|Outlines|Outline|Thread|Conclusion|think)>)/;
const hashRow = () => Number(location.hash.slice(1).replace("row=", "")) - 1;

let rows = []; // those that the filters let through, in order
let current = -1; // the row that is shown
let hits = null; // rows that hold what is searched for; null: no search
let query = "";

function detail(row) {
  const number = Math.floor(row / about.chunk);
  if (!chunks.has(number)) chunks.set(number, read(`chunk-${number}`));
  return chunks.get(number)[row % about.chunk];
}

const redundancy = (row) => (index.grams[row] ? index.repeated[row] / index.grams[row] : null);
const saved = (row) => (index.total[row] ? 1 - index.longest[row] / index.total[row] : 0);

// ---- the list

const longestRow = about.rows ? index.total.reduce((a, b) => Math.max(a, b), 1) : 1;

function verdict(row) {
  const right = index.right[row];
  if (right < 0) return make("span", "muted", "not graded");
  return right ? make("span", "good", "✓ right") : make("span", "bad", "✗ wrong");
}

const list = new VirtualList($("list"), 56, (element, i) => {
  const row = rows[i];
  element.id = `option-${row}`;
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", String(row === current));
  element.setAttribute("aria-setsize", rows.length);
  element.setAttribute("aria-posinset", i + 1);
  element.onclick = () => show(row);
  const bar = make("span", "length", null, make("i"));
  bar.style.width = `${Math.max(3, 44 * (index.total[row] / longestRow))}px`;
  bar.firstChild.style.width = `${100 * (index.total[row] ? index.longest[row] / index.total[row] : 0)}%`;
  const facts = make("span", "facts", null, verdict(row));
  if (index.breaches[row]) facts.append(make("span", "bad", "malformed"));
  facts.append(make("span", "muted", index.threads[row] ? plural(index.threads[row], "thread") : "sequential"));
  element.append(make("span", "muted number", count(row + 1)), make("span", "ask", index.ask[row]), bar, facts);
});

function filter() {
  const right = $("right").value, form = $("form").value;
  const least = Number($("least").value || 0), most = $("most").value === "" ? Infinity : Number($("most").value);
  rows = [];
  for (let row = 0; row < about.rows; row++) {
    if (right !== "" && index.right[row] !== Number(right)) continue;
    if (form && (index.breaches[row] > 0) !== (form === "ill")) continue;
    if (index.threads[row] < least || index.threads[row] > most) continue;
    if (hits && !hits.has(row)) continue;
    rows.push(row);
  }
  const key = { total: (r) => index.total[r], saved, redundancy: (r) => redundancy(r) ?? -1 }[$("order").value];
  if (key) rows.sort((a, b) => key(b) - key(a) || a - b);
  $("found").textContent = rows.length === about.rows ? `all ${plural(about.rows, "row")}` : `${count(rows.length)} of ${plural(about.rows, "row")}`;
  list.box.scrollTop = 0;
  list.reset(rows.length);
  if (rows.length && !rows.includes(current)) show(rows[0]);
  else if (rows.length) show(current);
  else empty();
}

// ---- the search, in slices, so that typing stays smooth

let searching = 0;

function textOf(line) {
  let text = "";
  for (const part of line) {
    if (part.s) for (const piece of part.s) text += typeof piece === "string" ? piece : "";
    else if (part.b) text += textOf(part.b);
    else text += textOf(part.open) + textOf(part.t) + textOf(part.close);
  }
  return text;
}

async function search() {
  const mine = ++searching;
  query = $("search").value.trim().toLowerCase();
  if (!query) {
    hits = null;
    filter();
    return;
  }
  const found = new Set();
  let slice = performance.now();
  for (let row = 0; row < about.rows; row++) {
    const { ask, answer, line } = detail(row);
    if (`${ask}\n${answer ?? ""}\n${textOf(line)}`.toLowerCase().includes(query)) found.add(row);
    if (performance.now() - slice > 20) {
      $("found").textContent = `searching: ${percent(row / about.rows, 0)}`;
      await new Promise((done) => setTimeout(done));
      if (mine !== searching) return;
      slice = performance.now();
    }
  }
  hits = found;
  filter();
}

// ---- one row

/** Text with tags set apart, and what is searched for marked. Empty lines at its top are not worth
 * their room. */
function appendText(box, text) {
  if (!box.hasChildNodes() || (box.childNodes.length === 1 && box.firstChild.className === "join")) text = text.replace(/^\n+/, "");
  for (const piece of text.split(TAG)) {
    if (!piece) continue;
    if (TAG.test(piece)) {
      box.append(make("span", "tag", piece));
      continue;
    }
    const lower = query ? piece.toLowerCase() : "";
    let done = 0;
    // A letter may be longer in lower case; such a text is shown without marks.
    if (query && lower.length === piece.length) {
      for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, done)) {
        box.append(piece.slice(done, at), make("mark", "hit", piece.slice(at, at + query.length)));
        done = at + query.length;
      }
    }
    box.append(piece.slice(done));
  }
}

function appendPart(box, part, breaches) {
  for (const piece of part.s) {
    if (typeof piece === "string") appendText(box, piece);
    else {
      const mark = make("mark", "breach", `▲ ${breaches[piece]}`);
      mark.id = `breach-${piece}`;
      mark.tabIndex = -1;
      box.append(mark);
    }
  }
}

/** A line below another: its texts and blocks. `path`: whether it is on the critical path. */
function fillLine(box, line, shown, path) {
  let text = null;
  for (const part of line) {
    if (part.s) {
      if (!text) box.append((text = make("div", "text")));
      appendPart(text, part, shown.breaches);
    } else {
      box.append(blockElement(part, shown, path));
      text = null;
    }
  }
}

function blockElement(block, shown, path) {
  const box = make("section", "block");
  box.id = `block-${shown.blocks}`;
  const threads = block.b.filter((part) => part.t);
  box.append(make("header", "", null, make("h3", "", `Block ${++shown.blocks}`),
    make("span", "muted", threads.length > 1 ? `${count(threads.length)} threads side by side` : threads.length ? "1 thread" : "no thread")));
  let text = null, lanes = null, before = 0;
  for (const part of block.b) {
    if (part.s) {
      // White space between threads is not worth a line of its own.
      const blank = part.s.every((piece) => typeof piece === "string" && !piece.trim());
      const home = lanes ?? box;
      if (blank && lanes) continue;
      if (!text) home.append((text = make("div", "text")));
      appendPart(text, part, shown.breaches);
      continue;
    }
    if (!lanes) box.append((lanes = make("div", "threads")));
    lanes.append(threadElement(part, block, shown, path, ++before));
    text = null;
  }
  if (lanes) {
    // What follows the last thread stands below the lanes.
    if (text && text.parentNode === lanes) {
      text.prepend(joinNote(block));
      lanes.after(text);
    }
    lanes.setAttribute("role", "group");
    lanes.tabIndex = 0;
    lanes.setAttribute("aria-label", "Threads");
  }
  return box;
}

function joinNote(block) {
  return make("div", "join", `↳ join: the longest thread takes ${plural(block.n, about.unit.slice(0, -1))}`);
}

function threadElement(part, block, shown, path, number) {
  const onPath = path && part.k === 1;
  const box = make("article", onPath ? "thread on-path" : "thread");
  box.id = `thread-${shown.threads++}`;
  const bar = make("div", "length", null, make("i"));
  bar.firstChild.style.width = `${block.n ? (100 * part.n) / block.n : 0}%`;
  const line = make("div", "line", null, make("h3", "", `Thread ${number}`), make("span", "number", `${plural(part.n, about.unit.slice(0, -1))}`));
  if (onPath) line.append(make("span", "critical", "critical"));
  const [repeated, grams] = part.r;
  const twice = make("span", "muted number", grams ? `redundancy ${percent(repeated / grams)}` : "redundancy –");
  twice.title = grams ? `${count(repeated)} of its ${count(grams)} 8-grams stand in a sibling` : "It has no eight words in a row";
  line.append(twice);
  const head = make("header", "", null, line, bar);
  box.append(head);
  fillLine(box, [...part.open, ...part.t, ...part.close], shown, onPath);
  return box;
}

// ---- the time line: its length is the critical path

const LANE = 8, GAP = 3;

/** Adds the bars of a line that begins at x, in lanes from y on; returns how many it takes. */
function layOut(line, x, y, path, owner, bars, ids) {
  let tall = 1;
  const add = (n) => {
    if (n) bars.push({ x, y, n, path, owner });
    x += n;
  };
  for (const part of line) {
    if (part.s) {
      add(part.n);
      continue;
    }
    // Outlines and the tags of threads are decoded on the line around the block.
    add(part.b.reduce((n, piece) => n + (piece.s ? piece.n : sum(piece.open) + sum(piece.close)), 0));
    let lane = y;
    for (const piece of part.b) {
      if (piece.t) lane += layOut(piece.t, x, lane, path && piece.k === 1, `thread-${ids.next++}`, bars, ids);
    }
    tall = Math.max(tall, lane - y);
    x += part.n;
  }
  return tall;
}

const sum = (parts) => parts.reduce((n, part) => n + part.n, 0);

function timeline(line, longest) {
  const bars = [];
  const tall = layOut(line, 0, 0, true, null, bars, { next: 0 });
  const height = tall * (LANE + GAP);
  const svg = draw("svg", { id: "timeline", viewBox: `0 0 1000 ${height}`, preserveAspectRatio: "none", height, role: "img", "aria-label": "Time line: lengths, threads side by side" });
  for (const bar of bars) {
    const width = (1000 * bar.n) / Math.max(longest, 1);
    const rect = draw("rect", { x: (1000 * bar.x) / Math.max(longest, 1), y: bar.y * (LANE + GAP), width: Math.max(width, 0.8), height: LANE, fill: bar.path ? "var(--critical)" : "var(--bar)" });
    rect.append(draw("title", {}, plural(bar.n, about.unit.slice(0, -1))));
    if (bar.owner) rect.onclick = () => $(bar.owner).scrollIntoView({ block: "start" });
    svg.append(rect);
  }
  return svg;
}

function fact(name, value, className) {
  return make("div", "", null, make("dt", "", name), make("dd", className, value));
}

function show(row) {
  current = row;
  const data = detail(row);
  for (const [i, element] of list.shown) element.setAttribute("aria-selected", String(rows[i] === row));
  const place = rows.indexOf(row);
  if (place >= 0) list.reveal(place);
  $("list").setAttribute("aria-activedescendant", `option-${row}`);
  $("name").textContent = `Row ${count(row + 1)}`;
  $("source").textContent = `\u2068${data.source}\u2069`;
  $("source").title = data.source;
  $("previous").disabled = place <= 0;
  $("next").disabled = place < 0 || place === rows.length - 1;

  const box = $("row");
  const facts = make("dl", "facts-row");
  const right = index.right[row];
  facts.append(fact("answer", right < 0 ? "not graded" : right ? "✓ right" : "✗ wrong", right < 0 ? "muted" : right ? "good" : "bad"));
  if (data.answer !== undefined) facts.append(fact("expected", data.answer));
  facts.append(fact("format", data.breaches.length ? plural(data.breaches.length, "breach", "breaches") : "well formed", data.breaches.length ? "bad" : "good"));
  facts.append(fact("blocks", count(data.blocks)), fact("threads", count(index.threads[row])));
  facts.append(fact(`all ${about.unit}`, count(index.total[row])), fact("critical path", count(index.longest[row]), "critical"));
  facts.append(fact("acceleration", percent(saved(row))));
  const twice = redundancy(row);
  if (twice !== null) facts.append(fact("redundancy", percent(twice)));
  if (data.recorded) facts.append(fact("tokens, critical path in the file", data.recorded.map(count).join(", ")));
  if (data.mode) facts.append(fact("decoded", data.mode));
  box.replaceChildren(facts);

  if (data.breaches.length) {
    const found = make("ul", "breaches");
    data.breaches.forEach((line, i) => {
      const button = make("button", "", `▲ ${line}`);
      button.onclick = () => goTo(i);
      found.append(make("li", "", null, button));
    });
    box.append(found);
  }
  box.append(timeline(data.line, index.longest[row]));
  const legend = make("p", "legend muted");
  for (const [name, text] of [["critical", "critical path"], ["bar", "decoded meanwhile"]]) {
    const swatch = make("i");
    swatch.style.background = `var(--${name})`;
    legend.append(make("span", "", null, swatch, text));
  }
  legend.append(make("span", "", `lengths in ${about.unit}`));
  const prompt = make("details", "prompt", null, make("summary", "", "Prompt"));
  prompt.open = data.ask.length < 2000;
  prompt.append(make("div", "ask-text"));
  appendText(prompt.lastChild, data.ask);
  box.append(legend, prompt);
  fillLine(box, data.line, { breaches: data.breaches, blocks: 0, threads: 0 }, true);
  if (!data.line.length) box.append(make("p", "empty", "The response is empty."));
  $("main").scrollTop = 0;
  history.replaceState(null, "", `#row=${row + 1}`);
}

function empty() {
  current = -1;
  $("name").textContent = "No row";
  $("source").textContent = "";
  $("previous").disabled = $("next").disabled = true;
  $("row").replaceChildren(make("p", "empty", "No row passes the filters."));
}

let breach = -1;
function goTo(i) {
  breach = i;
  const mark = $(`breach-${i}`);
  if (!mark) return;
  mark.scrollIntoView({ block: "center", inline: "center" });
  mark.focus({ preventScroll: true });
}

function step(by) {
  const place = rows.indexOf(current) + by;
  if (place >= 0 && place < rows.length) {
    breach = -1;
    show(rows[place]);
  }
}

// ---- start

$("file").textContent = about.file;
$("file").title = about.path;
{
  const graded = index.right?.filter((right) => right >= 0) ?? [];
  const well = index.breaches?.filter((n) => !n).length ?? 0;
  const parts = [plural(about.rows, "row")];
  if (graded.length) parts.push(`${percent(graded.reduce((a, b) => a + b, 0) / graded.length)} right`);
  parts.push(`${percent(well / Math.max(about.rows, 1))} well formed`);
  $("totals").textContent = parts.join(" · ");
}
let typing = 0;
$("search").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(search, 150);
};
$("filters").onsubmit = (event) => event.preventDefault();
for (const id of ["right", "form", "least", "most", "order"]) $(id).oninput = filter;
$("previous").onclick = () => step(-1);
$("next").onclick = () => step(1);
addEventListener("hashchange", () => {
  if (hashRow() >= 0 && hashRow() < about.rows) show(hashRow());
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typed = event.target.closest("input, select");
  if (event.key === "Escape" && typed) typed.blur();
  if (typed) return;
  const inList = event.target === $("list");
  const keys = { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1 };
  if (inList) Object.assign(keys, { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 });
  if (event.target.closest(".threads") && event.key.startsWith("Arrow")) return;
  if (keys[event.key]) step(keys[event.key]);
  else if (event.key === "/") $("search").focus();
  else if (event.key === "b" && detail(current)?.breaches.length) goTo((breach + 1) % detail(current).breaches.length);
  else return;
  event.preventDefault();
});
startTheme();
current = hashRow() >= 0 && hashRow() < about.rows ? hashRow() : 0;
filter();
ready();
