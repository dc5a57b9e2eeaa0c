// A run as its files are. With about.reload the page reads itself anew and keeps what was chosen.

const about = read("about");
const run = read("run");
const WORDS = { sft: "SFT", self_train: "self-training", "self_train/sft": "SFT of self-training", rl: "P-GRPO", "": "run" };
const named = (stage) => WORDS[stage] ?? stage;
const SHARES = new Set(["accuracy", "format", "activation", "acceleration", "redundancy", "clip_share"]);
const figure = (name, value) => {
  if (value === null || value === undefined) return "–";
  if (SHARES.has(name)) return percent(value);
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return value.toExponential(2);
  return Number.isInteger(value) ? count(value) : value.toLocaleString("en", { maximumSignificantDigits: 4 });
};

// What a person chose outlives a reload.
const KEY = `threadweaver-run ${about.path}`;
let kept = {};
try {
  kept = JSON.parse(sessionStorage.getItem(KEY)) ?? {};
} catch {}
const keep = (name, value) => {
  kept[name] = value;
  try {
    sessionStorage.setItem(KEY, JSON.stringify(kept));
  } catch {}
};
const remembers = (details, name) => {
  details.open = kept[name] === true;
  details.ontoggle = () => keep(name, details.open);
};

// ---- stages and evaluations

for (const stage of run.stages) {
  const card = make("div", "card", null, make("h3", "", named(stage.name)));
  const state = stage.finished ? "finished" : stage.steps.length ? "running, or stopped" : "begun";
  card.append(make("span", stage.finished ? "good" : "critical", state));
  const list = make("dl", "figures");
  if (stage.steps.length) list.append(make("dt", "", "steps"), make("dd", "", count(stage.done)));
  for (const name of ["loss", "validation_loss", "reward", "accuracy", "longest_path_tokens", "tokens_per_second"]) {
    if (name in stage.last && !(name === "loss" && "reward" in stage.last)) list.append(make("dt", "", name.replaceAll("_", " ")), make("dd", "", figure(name, stage.last[name])));
  }
  if (run.rejects && stage.name === "self_train") list.append(make("dt", "", "kept"), make("dd", "", `${count(run.rejects.kept)} of ${count(run.rejects.rollouts)}`));
  card.append(list);
  for (const folder of stage.not_finite) card.append(make("div", "bad", `not finite: ${folder}`));
  $("stages").append(card);
}
if (run.table.length) {
  $("table").hidden = false;
  const names = ["accuracy", "format", "activation", "threads_per_block", "total_tokens", "longest_path_tokens", "acceleration", "redundancy"]
    .filter((name) => run.table.some((row) => name in row));
  const table = $("table").querySelector("table");
  table.append(make("tr", "", null, ...["stage", "mode", ...names].map((name) => make("th", "", name.replaceAll("_", " ")))));
  let last = null;
  for (const row of run.table) {
    const cells = [row.stage === last ? "" : named(row.stage), row.mode, ...names.map((name) => figure(name, name.endsWith("tokens") ? Math.round(10 * row[name]) / 10 : row[name]))];
    table.append(make("tr", row.stage === last ? "" : "new-stage", null, ...cells.map((cell) => make("td", "", cell))));
    last = row.stage;
  }
}

// ---- curves: a figure and its held-out ones in one chart

const HELD_OUT = [["validation_parallel_", "held out, parallel", "critical"], ["validation_sequential_", "held out, sequential", "good"], ["validation_", "held out", "critical"]];
const FIRST = ["loss", "reward", "reward_correct", "reward_speed", "accuracy", "format", "activation", "acceleration", "redundancy", "longest_path_tokens", "total_tokens", "entropy", "kl", "mismatch", "gradient_norm", "learning_rate", "tokens_per_second"];
const charts = []; // each moves its cursor to a step

function families(stage) {
  const found = new Map();
  for (const name of Object.keys(stage.figures)) {
    const of = HELD_OUT.find(([prefix]) => name.startsWith(prefix) && name.slice(prefix.length) in stage.figures);
    const base = of ? name.slice(of[0].length) : name;
    if (!found.has(base)) found.set(base, []);
    found.get(base).push({ name, tone: of ? of[2] : "accent", held: Boolean(of) });
  }
  const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return [...found].sort(([a], [b]) => rank(a) - rank(b));
}

function chart(stage, name, series) {
  const box = make("div", "chart");
  const value = make("span", "number", "");
  const heading = make("h3", "", name.replaceAll("_", " "));
  heading.title = name;
  box.append(make("div", "name", null, heading, value));
  const steps = stage.steps, from = steps[0], to = steps.at(-1);
  let low = Infinity, high = -Infinity;
  for (const { name } of series) for (const y of stage.figures[name]) if (y !== null) (low = Math.min(low, y)), (high = Math.max(high, y));
  const flat = high === low;
  const x = (step) => (to === from ? 500 : (1000 * (step - from)) / (to - from));
  const y = (v) => (flat ? 50 : 96 - (92 * (v - low)) / (high - low));
  const svg = draw("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": `${name}: ${figure(name, stage.last[name])} at the last step` });
  for (const at of [4, 96]) svg.append(draw("line", { class: "grid", x1: 0, x2: 1000, y1: at, y2: at }));
  for (const { name, tone, held } of series) {
    let path = "", points = 0;
    stage.figures[name].forEach((v, i) => {
      if (v === null) return void (held || (points = 0)); // held-out points are far between: joined
      const command = points++ ? "L" : "M";
      path += `${command}${x(steps[i]).toFixed(1)} ${y(v).toFixed(1)}`;
      if (held || steps.length === 1) path += "m-.1 0h.2"; // a dot, by the round ends
    });
    svg.append(draw("path", { d: path, stroke: `var(--${tone})`, class: steps.length === 1 ? "dot" : held ? "held" : "" }));
  }
  const cursor = draw("line", { class: "cursor", y1: 0, y2: 100, visibility: "hidden" });
  svg.append(cursor);
  const scale = make("div", "scale", null, make("span", "", figure(name, high)), make("span", "", flat ? "" : figure(name, low)));
  const plot = make("div", "plot", null, svg, scale);
  box.append(plot, make("div", "ends", null, make("span", "", `step ${count(from)}`), make("span", "", count(to))));
  const rest = () => {
    value.replaceChildren(make("span", "", figure(name, stage.last[name])));
    cursor.setAttribute("visibility", "hidden");
  };
  const at = (i) => {
    for (const [name, value] of [["x1", x(steps[i])], ["x2", x(steps[i])], ["visibility", "visible"]]) cursor.setAttribute(name, value);
    const shown = series.filter(({ name }) => stage.figures[name][i] !== null);
    value.replaceChildren(...shown.map(({ name: of, tone }) => {
      const span = make("span", "", ` ${figure(name, stage.figures[of][i])}`);
      span.style.color = `var(--${tone})`;
      return span;
    }));
  };
  rest();
  charts.push({ at, rest });
  svg.addEventListener("pointermove", (event) => {
    const part = (event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth;
    const wanted = from + part * (to - from);
    let i = 0;
    while (i + 1 < steps.length && Math.abs(steps[i + 1] - wanted) <= Math.abs(steps[i] - wanted)) i++;
    for (const other of charts) other.at(i);
    $("legend").lastChild.textContent = `step ${count(steps[i])}`;
  });
  svg.addEventListener("pointerleave", () => {
    for (const other of charts) other.rest();
    $("legend").lastChild.textContent = "the figure beside a name is that of the last step";
  });
  return box;
}

const trained = run.stages.filter((stage) => stage.steps.length);
let open = trained.find((stage) => stage.name === kept.stage) ?? trained.at(-1);

function showCurves() {
  const wanted = $("search").value.trim().toLowerCase().replaceAll(" ", "_");
  charts.length = 0;
  $("charts").replaceChildren();
  for (const [name, series] of families(open)) if (name.includes(wanted)) $("charts").append(chart(open, name, series));
  if (!charts.length) $("charts").append(make("p", "muted", "No figure of that name."));
  const tones = new Map(families(open).flatMap(([, series]) => series).filter((one) => one.held)
    .map(({ name, tone }) => [HELD_OUT.find(([prefix]) => name.startsWith(prefix))[1], tone]));
  $("legend").replaceChildren(...[["training", "accent"], ...tones].map(([text, tone]) => {
    const swatch = make("i");
    swatch.style.background = `var(--${tone})`;
    return make("span", "", null, swatch, text);
  }), make("span", "number", "the figure beside a name is that of the last step"));
  for (const tab of $("tabs").children) tab.setAttribute("aria-selected", String(tab.dataset.stage === open.name));
}

if (open) {
  $("curves").hidden = false;
  if (trained.length > 1) {
    for (const stage of trained) {
      const tab = make("button", "", named(stage.name));
      tab.setAttribute("role", "tab");
      tab.dataset.stage = stage.name;
      tab.onclick = () => {
        open = stage;
        keep("stage", stage.name);
        showCurves();
      };
      $("tabs").append(tab);
    }
  }
  $("search").value = kept.search ?? "";
  $("search").oninput = () => {
    keep("search", $("search").value);
    showCurves();
  };
  showCurves();
}

// ---- rejects and samples

if (run.rejects) {
  $("rejects").hidden = false;
  const { rollouts, kept: good, rejected, violations, so_far } = run.rejects;
  $("kept").textContent = `${count(good)} of ${plural(rollouts, "rollout")} ${so_far ? "are right and well formed so far" : "kept"} (${percent(good / Math.max(rollouts, 1))}).`;
  const bars = (title, rows, kind = "") => {
    const most = Math.max(1, ...rows.map(([, n]) => n));
    if (!rows.length) return;
    $("reasons").append(make("h3", "", title));
    for (const [name, n] of rows) {
      const gauge = make("span", `gauge ${kind}`, null, make("i"));
      gauge.firstChild.style.width = `${(100 * n) / most}%`;
      $("reasons").append(make("span", "", name), gauge, make("span", "number", count(n)));
    }
  };
  bars("Left out because", Object.entries(rejected).filter(([, n]) => n));
  bars("First breach of the format, right answers or not", Object.entries(violations));
}
if (run.samples.length) {
  $("samples").hidden = false;
  run.samples.forEach((sample, i) => {
    const tone = sample.kind === "right" ? "good" : "bad";
    const box = make("details", "sample", null, make("summary", "", null, make("span", tone, sample.kind), make("span", "ask", sample.ask), make("span", "muted", `${sample.file}, row ${sample.row}`)));
    for (const line of sample.breaches) box.append(make("div", "bad", `▲ ${line}`));
    box.append(make("pre", "", sample.response + (sample.cut ? " …" : "")));
    remembers(box, `${sample.file} ${sample.row}`);
    $("responses").append(box);
  });
}
if (run.damaged.length) {
  $("damaged").hidden = false;
  $("damaged").append(...run.damaged.map((line) => make("li", "", line)));
}
$("config").querySelector("pre").textContent = run.config;
remembers($("config"), "config");

// ---- the bar, and the reload

$("file").textContent = about.name;
$("file").title = about.path;
$("state").textContent = run.finished ? "finished" : run.running ? "running" : "not finished";
$("state").className = run.finished ? "good" : "critical";
$("written").textContent = `written ${about.written}`;
if (about.reload) {
  let timer = 0;
  const pause = (paused) => {
    clearTimeout(timer);
    if (!paused) timer = setTimeout(() => location.reload(), 1000 * about.reload);
    $("pause").textContent = paused ? "Go on" : "Pause";
    $("pause").onclick = () => pause(!paused);
  };
  $("pause").hidden = false;
  pause(false);
}
startTheme();
ready();
