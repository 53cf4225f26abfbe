// The report page. Data arrives as JSON and is shown through textContent only, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs.map(({ row, ...run }, index) => ({ ...row, ...run, name: row.point, index }));
  const at = (id) => document.getElementById(id);
  const make = (tag, text, attributes = {}) => {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const number = (value, digits = 4) => (typeof value === "number" ? value.toFixed(digits) : "");
  const duration = (s) => (!s ? "" : s < 90 ? `${s.toFixed(0)} s` : s < 5400 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(1)} h`);
  const link = (path) => path.split("/").map(encodeURIComponent).join("/");
  const source = (path) => (path.startsWith("data:") ? path : link(path));

  // ---- what is comparable

  const heldOut = (run) => run.validation_best_loss;
  const measured = runs.filter((run) => run.objective !== null || heldOut(run) !== null);
  const measuredOn = (run) => run.validation_hash || run.trained_on;
  const ways = new Set(measured.map(measuredOn));
  const validated = runs.some((run) => heldOut(run) !== null);
  const ranked = runs.filter((run) => run.rank !== null).sort((a, b) => a.rank - b.rank); // none if they do not compare
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].sort();
  const varied = keys.filter((key) => new Set(runs.map((run) => run.settings[key])).size > 1);

  // in the legends of charts, what tells a run from the others
  const apart = (run) => varied.map((key) => `${key.split(".").pop()}=${run.settings[key] ?? ""}`).join(" ");
  const allApart = varied.length > 0 && new Set(runs.map(apart)).size === runs.length;
  for (const run of runs) run.label = allApart ? apart(run) : run.name;

  at("title").textContent = data.title;
  const counts = {};
  for (const run of runs) counts[run.status] = (counts[run.status] || 0) + 1;
  at("summary").textContent =
    `${runs.length} ${runs.length === 1 ? "run" : "runs"}: ` +
    Object.entries(counts).map(([status, n]) => `${n} ${status}`).join(", ") +
    (ranked.length ? `. Lowest ${validated ? "held-out" : "smoothed"} loss ${number(ranked[0].objective)}, ${ranked[0].name}` : "") +
    `. Written ${data.made}.`;
  if (ways.size > 1) {
    at("warning").hidden = false;
    at("warning").textContent =
      `The losses of these runs were measured in ${ways.size} ways, on other songs, times or models, so they cannot be ` +
      `compared${ranked.length ? "" : " and no rank is given"}. Compare within one value of the column “evaluated”.`;
  }

  // ---- the table

  const columns = [
    ...(ranked.length > 1 ? [{ name: "rank", value: (r) => r.rank ?? null, number: true, digits: 0 }] : []),
    { name: "run", value: (r) => r.name || "(not begun)" },
    { name: "status", value: (r) => r.status },
    ...varied.map((key) => ({ name: key, value: (r) => r.settings[key] ?? "", setting: true })),
    ...(validated
      ? [
          { name: "held-out loss", value: heldOut, number: true },
          { name: "base", value: (r) => r.validation_base_loss, number: true },
          { name: "best step", value: (r) => r.validation_best_step, number: true, digits: 0 },
          { name: "training songs", value: (r) => r.validation_best_train_loss, number: true },
        ]
      : []),
    ...(!validated || measured.some((run) => !run.validation_hash) ? [{ name: "smoothed loss", value: (r) => (r.validation_hash ? null : r.objective), number: true }] : []),
    ...(ways.size > 1 ? [{ name: "evaluated", value: measuredOn }] : []),
    { name: "steps", value: (r) => r.step, show: (r) => (r.num_steps ? `${r.step} of ${r.num_steps}` : ""), number: true },
    { name: "time of steps", value: (r) => r.train_seconds, show: (r) => duration(r.train_seconds), number: true },
    ...(runs.some((r) => r.seconds) ? [{ name: "time in all", value: (r) => r.seconds, show: (r) => duration(r.seconds), number: true }] : []),
    { name: "memory", value: (r) => r.memory_gib, show: (r) => (r.memory_gib ? `${number(r.memory_gib, 1)} GiB` : ""), number: true },
    { name: "error", value: (r) => r.error },
  ];
  let most = 300; // rows that are drawn before somebody asks for all of them
  const order = { column: ranked.length > 1 ? "rank" : "run", down: false };
  const chosen = new Set((ranked.length ? ranked : runs.filter((run) => run.steps.length)).slice(0, 5).map((run) => run.index));

  const shown = (column, run) => (column.show ? column.show(run) : column.number ? number(column.value(run), column.digits) : column.value(run));
  const matches = (run) => {
    if (at("status").value && run.status !== at("status").value) return false;
    const text = [...columns.map((column) => shown(column, run)), ...Object.entries(run.settings).map(([k, v]) => `${k}=${v}`)].join(" ").toLowerCase();
    return at("filter").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  };
  const compare = (a, b) => {
    const column = columns.find((c) => c.name === order.column);
    const [x, y] = [column.value(a), column.value(b)];
    const empty = (v) => v === null || v === undefined || v === "";
    if (empty(x) || empty(y)) return empty(x) - empty(y); // what is not known stays at the end
    const [p, q] = [Number(x), Number(y)];
    const result = !Number.isNaN(p) && !Number.isNaN(q) ? p - q : String(x).localeCompare(String(y), "en", { numeric: true });
    return order.down ? -result : result;
  };

  function drawHead() {
    const row = make("tr");
    row.append(make("th", "show", { scope: "col" }));
    for (const column of columns) {
      const cell = make("th", null, { scope: "col", class: column.number ? "number" : "text", "aria-sort": order.column !== column.name ? "none" : order.down ? "descending" : "ascending" });
      const button = make("button", column.name, { type: "button" });
      button.addEventListener("click", () => {
        order.down = order.column === column.name && !order.down;
        order.column = column.name;
        drawTable();
        [...at("runs").tHead.querySelectorAll("button")].find((b) => b.textContent === column.name).focus();
      });
      cell.append(button);
      row.append(cell);
    }
    at("runs").tHead.replaceChildren(row);
  }

  function drawTable() {
    drawHead();
    const visible = runs.filter(matches).sort(compare);
    const rows = visible.slice(0, most).map((run) => {
      const row = make("tr");
      const box = make("input", null, { type: "checkbox", "aria-label": `show ${run.name}` });
      box.checked = chosen.has(run.index);
      box.addEventListener("change", () => {
        box.checked ? chosen.add(run.index) : chosen.delete(run.index);
        drawCharts();
        drawPlayers();
      });
      row.append(make("td"));
      row.lastChild.append(box);
      for (const column of columns) {
        const cell = make("td", column.name === "run" ? "" : shown(column, run), { class: column.number ? "number" : column.name === "error" ? "error" : "text" });
        if (column.name === "run") cell.append(run.folder ? make("a", run.name, { href: `${link(run.folder)}/run.json` }) : make("span", column.value(run)));
        row.append(cell);
      }
      return row;
    });
    at("runs").tBodies[0].replaceChildren(...rows);
    at("count").textContent = `${rows.length} of ${runs.length} shown`;
    at("more").hidden = rows.length === visible.length;
    at("more").textContent = `Show all ${visible.length}`;
  }

  at("more").addEventListener("click", () => {
    most = Infinity;
    drawTable();
    at("filter").focus();
  });

  for (const status of ["", ...Object.keys(counts)]) at("status").append(make("option", status || "all", { value: status }));
  at("status").addEventListener("change", drawTable);
  at("filter").addEventListener("input", drawTable);

  // ---- curves

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const strokes = () => {
    const list = [...chosen].sort((a, b) => a - b);
    return new Map(list.map((index, place) => [index, colour(`--c${place % 8}`)]));
  };
  const picked = () => [...chosen].sort((a, b) => a - b).map((index) => runs[index]);
  let plots = [];
  const [DASHED, DOTTED] = [[6, 4], [1, 4]];

  const zooms = new Map(); // which part each chart shows, also after it is drawn anew; null for all of it
  const moves = {
    "zoom in": ["+", (from, to) => [from + (to - from) / 4, to - (to - from) / 4]],
    "zoom out": ["−", (from, to) => [from - (to - from) / 2, to + (to - from) / 2]],
    "to the left": ["←", (from, to) => [from - (to - from) / 2, to - (to - from) / 2]],
    "to the right": ["→", (from, to) => [from + (to - from) / 2, to + (to - from) / 2]],
    "show all": ["all", () => [-Infinity, Infinity]],
  };
  /** Buttons that zoom a chart, which a finger and a keyboard reach as well as a mouse, and words that say what it shows. */
  function addZoom(id, label, first, last) {
    const tools = make("div", null, { class: "zoom", role: "group", "aria-label": `Zoom of ${at(id).parentNode.querySelector("figcaption").textContent}` });
    const said = make("span", null, { role: "status" });
    let made = null;
    const show = (from, to) => {
      // moved back inside where it would leave the data, and never so far in that nothing is left
      const width = Math.max(Math.min(to - from, last - first), (last - first) / 1000);
      from = Math.min(Math.max(from, first), last - width);
      made.setScale("x", { min: from, max: from + width });
    };
    for (const [name, [sign, move]] of Object.entries(moves)) {
      const button = make("button", sign, { type: "button", "aria-label": name });
      button.addEventListener("click", () => show(...move(made.scales.x.min, made.scales.x.max)));
      tools.append(button);
    }
    tools.append(said);
    return {
      tools,
      start: (plot) => {
        made = plot;
        if (zooms.get(id)) show(...zooms.get(id));
      },
      saw: (plot) => {
        const { min, max } = plot.scales.x;
        if (made) zooms.set(id, min > first || max < last ? [min, max] : null); // by the mouse, too
        const digits = last - first > 10 ? 0 : 2;
        said.textContent = `${label} ${min.toFixed(digits)} to ${max.toFixed(digits)}`;
      },
    };
  }

  function plot(id, label, series, options = {}) {
    const place = at(id);
    place.replaceChildren();
    const lines = series.filter((line) => line.x.length && line.y.some((y) => y !== null));
    if (!lines.length) {
      place.append(make("p", options.empty || "Nothing to draw: tick a run that has these numbers.", { class: "empty" }));
      return;
    }
    const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const where = new Map(xs.map((x, i) => [x, i]));
    const ys = lines.map((line) => {
      const y = new Array(xs.length).fill(options.points ? null : undefined); // undefined: the line goes on
      line.x.forEach((x, i) => (y[where.get(x)] = line.y[i]));
      return y;
    });
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    const pad = xs.length > 1 ? (xs[xs.length - 1] - xs[0]) * 0.04 : 0.5;
    const zoom = !options.points && !options.bars && xs.length > 1 ? addZoom(id, label, xs[0], xs[xs.length - 1]) : null;
    const made = new uPlot(
      {
        width: Math.max(260, place.clientWidth),
        height: 240,
        scales: {
          x: { time: false, range: options.points ? () => [xs[0] - pad, xs[xs.length - 1] + pad] : options.bars ? [0, 1] : undefined },
          y: { range: options.bars ? (_, low, high) => [0, high * 1.1] : undefined }, // a bar's length is its value
        },
        axes: [
          { ...axis, ...(options.labels ? { splits: () => xs, values: (_, values) => values.map((v) => options.labels[v] ?? "") } : {}) },
          { ...axis, size: 60 },
        ],
        legend: { show: !options.points },
        cursor: { drag: { x: zoom !== null } },
        hooks: { setScale: zoom ? [(plot, key) => key === "x" && zoom.saw(plot)] : [] },
        series: [
          { label },
          ...lines.map((line) => ({
            label: line.label,
            stroke: line.stroke,
            width: 1.5,
            dash: line.dash,
            spanGaps: true,
            paths: options.points ? () => null : line.bars ? uPlot.paths.bars({ size: [line.width, 60], align: line.align }) : undefined,
            fill: line.bars ? line.stroke : undefined,
            points: { show: options.points || (line.x.length < 25 && !line.bars), size: options.points ? 9 : 5, fill: options.points ? line.stroke : undefined },
            value: (_, value) => (value === null || value === undefined ? "" : value.toFixed(4)),
          })),
        ],
      },
      [xs, ...ys],
      place,
    );
    made.root.setAttribute("role", "img");
    made.root.setAttribute("aria-label", place.parentNode.querySelector("figcaption").textContent);
    if (zoom) {
      zoom.start(made);
      place.append(zoom.tools);
    }
    plots.push(made);
  }

  function drawCharts() {
    for (const made of plots) made.destroy();
    plots = [];
    const stroke = strokes();
    const list = picked();
    plot("chart-train", "step", list.map((run) => ({ label: run.label, x: run.steps, y: run.losses, stroke: stroke.get(run.index) })));
    plot(
      "chart-validation",
      "step",
      list.flatMap((run) => {
        const { steps: x, losses, train_losses, base_losses } = run.evaluations;
        return [
          { label: run.label, x, y: losses, stroke: stroke.get(run.index) },
          { label: "training songs", x, y: train_losses, stroke: stroke.get(run.index), dash: DOTTED },
          { label: "base model", x, y: base_losses, stroke: stroke.get(run.index), dash: DASHED },
        ];
      }),
      { empty: "No held-out songs: train with validation.fraction=0.1." },
    );
    plot(
      "chart-drift",
      "step",
      list.map((run) => ({ label: run.label, x: run.evaluations.steps, y: run.evaluations.drifts, stroke: stroke.get(run.index) })),
      { empty: "No held-out songs: train with validation.fraction=0.1." },
    );
    plot(
      "chart-times",
      "time",
      list.flatMap((run) => {
        const best = run.by_time;
        if (!best.times) return [];
        return [
          { label: run.label, x: best.times, y: best.losses, stroke: stroke.get(run.index), bars: list.length === 1, width: 0.5, align: 0 },
          { label: "base model", x: best.times, y: best.base_losses, stroke: list.length === 1 ? colour("--soft") : stroke.get(run.index), dash: DASHED },
        ];
      }),
      { empty: "No held-out songs: train with validation.fraction=0.1.", bars: list.length === 1 },
    );
    drawSetting();
    at("legend").replaceChildren(
      ...list.map((run) => {
        const item = make("li");
        const line = make("i");
        line.style.background = stroke.get(run.index);
        item.append(line, make("span", run.name));
        return item;
      }),
    );
  }

  function drawSetting() {
    const key = at("setting").value;
    const known = ranked.filter((run) => key in run.settings);
    if (ways.size > 1 && !ranked.length) return plot("chart-setting", key, [], { empty: "The losses cannot be compared." });
    const words = known.some((run) => Number.isNaN(Number(run.settings[key])) || run.settings[key] === "");
    const names = [...new Set(known.map((run) => run.settings[key]))].sort((a, b) => (words ? a.localeCompare(b) : a - b));
    const spread = !words && names.length > 1 && names[0] > 0 && names[names.length - 1] / names[0] >= 30; // learning rates: even steps
    const position = (run) => (words || spread ? names.indexOf(run.settings[key]) : Number(run.settings[key]));
    // uPlot keeps one y per x and series: a ticked run is a series, and of the others so many as share a position
    const [ticked, others, taken] = [[], [], new Map()];
    for (const run of known) {
      const [x, y] = [position(run), run.objective];
      if (chosen.has(run.index)) {
        ticked.push({ label: run.label, x: [x], y: [y], stroke: strokes().get(run.index) });
        continue;
      }
      const place = taken.get(x) || 0;
      taken.set(x, place + 1);
      (others[place] ||= { label: "others", x: [], y: [], stroke: colour("--soft") }).x.push(x);
      others[place].y.push(y);
    }
    plot(
      "chart-setting",
      key,
      [...others, ...ticked],
      { points: true, labels: words || spread ? Object.fromEntries(names.map((n, i) => [i, n])) : null, empty: "No setting differs between finished runs." },
    );
  }

  at("lowest").textContent = validated ? "Lowest held-out loss by" : "Smoothed training loss by";
  at("setting").closest("figure").hidden = !varied.length;
  for (const key of varied) at("setting").append(make("option", key, { value: key }));
  at("setting").addEventListener("change", drawCharts);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  let resizing = 0;
  addEventListener("resize", () => {
    clearTimeout(resizing);
    resizing = setTimeout(drawCharts, 150);
  });

  // ---- listening

  const piece = (p) => `${p.prompt} (seed ${p.seed})`;
  const pieces = [...new Set(runs.flatMap((run) => run.previews.map(piece)))];
  for (const name of pieces) at("piece").append(make("option", name.length > 70 ? `${name.slice(0, 60)}… ${name.slice(-9)}` : name, { value: name }));
  at("listening").hidden = !pieces.length;
  at("linked").hidden = !runs.some((run) => run.previews.some((p) => !p.audio.startsWith("data:")));
  const describe = (c) => (c.preview.scale === 0 ? "base model" : `${c.run.name}, epoch ${c.preview.epoch}, scale ${c.preview.scale}`);

  /** What can be heard of one piece of music: the base model once, then each ticked run. */
  function candidates(name, epoch) {
    const list = [];
    const bases = new Set();
    for (const run of picked()) {
      const last = Math.max(0, ...run.previews.map((p) => p.epoch));
      for (const preview of run.previews.filter((p) => piece(p) === name)) {
        if (preview.scale === 0) {
          if (bases.has(preview.hash)) continue;
          bases.add(preview.hash);
        } else if (epoch !== "all" && preview.epoch !== (epoch === "last" ? last : Number(epoch))) continue;
        list.push({ run, preview });
      }
    }
    return list.sort((a, b) => (a.preview.scale !== 0) - (b.preview.scale !== 0));
  }

  function drawPlayers() {
    const epochs = [...new Set(picked().flatMap((run) => run.previews.filter((p) => p.scale !== 0).map((p) => p.epoch)))].sort((a, b) => a - b);
    const before = at("epoch").value || "last";
    at("epoch").replaceChildren(...["last", "all", ...epochs].map((e) => make("option", e, { value: e })));
    at("epoch").value = ["all", ...epochs.map(String)].includes(before) ? before : "last";
    const list = candidates(at("piece").value, at("epoch").value);
    at("players").replaceChildren(
      ...list.map((candidate) => {
        const card = make("div", null, { class: "player" });
        card.append(make("strong", describe(candidate)));
        if (candidate.preview.picture) card.append(make("img", null, { src: source(candidate.preview.picture), alt: "Spectrogram up to 12 kHz", loading: "lazy" }));
        card.append(make("audio", null, { src: source(candidate.preview.audio), controls: "", preload: "none", "aria-label": describe(candidate) }));
        return card;
      }),
      ...(list.length ? [] : [make("p", "Tick a run that has previews.", { class: "empty" })]),
    );
    at("blind-start").disabled = list.length < 2;
  }
  at("piece").addEventListener("change", drawPlayers);
  at("epoch").addEventListener("change", drawPlayers);
  document.addEventListener("play", (event) => { // one at a time
    for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
  }, true);

  // ---- blind comparison

  let pairs = [];
  const choices = [];
  const shuffle = (list) => {
    for (let i = list.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [list[i], list[j]] = [list[j], list[i]];
    }
    return list;
  };

  function nextPair() {
    const pair = pairs[0];
    if (!pair) return endBlind();
    at("blind-prompt").textContent = piece(pair[0].preview);
    at("blind-a").src = source(pair[0].preview.audio);
    at("blind-b").src = source(pair[1].preview.audio);
    at("blind-count").textContent = `${pairs.length} to go`;
  }

  function startBlind() {
    pairs = [];
    for (const name of pieces) {
      const list = candidates(name, at("epoch").value);
      for (let i = 0; i < list.length; i++) for (let j = i + 1; j < list.length; j++) pairs.push(shuffle([list[i], list[j]]));
    }
    pairs = shuffle(pairs).slice(0, 30);
    at("players").hidden = true; // no name may be seen
    at("blind").hidden = false;
    at("blind-result").hidden = true;
    nextPair();
    at("blind-prompt").focus(); // no button, which the key that was pressed here would press at once
  }

  const saved = (c) => ({ run: c.run.name, epoch: c.preview.epoch, scale: c.preview.scale, file: c.preview.file || c.preview.audio });
  function choose(choice) {
    const [a, b] = pairs.shift();
    choices.push({ prompt: a.preview.prompt, seed: a.preview.seed, a: saved(a), b: saved(b), better: choice, names: [describe(a), describe(b)] });
    nextPair();
  }

  function endBlind() {
    pairs = [];
    for (const id of ["blind-a", "blind-b"]) at(id).pause();
    at("blind").hidden = true;
    at("players").hidden = false;
    at("blind-result").hidden = !choices.length;
    const score = new Map();
    for (const choice of choices) {
      choice.names.forEach((name, i) => {
        const row = score.get(name) || { won: 0, heard: 0 };
        row.heard += 1;
        row.won += choice.better === "ab"[i] ? 1 : choice.better === "none" ? 0.5 : 0;
        score.set(name, row);
      });
    }
    const head = make("tr");
    head.append(...["what", "preferred", "heard"].map((name) => make("th", name, { scope: "col" })));
    at("choices").tHead.replaceChildren(head);
    at("choices").tBodies[0].replaceChildren(
      ...[...score].sort((a, b) => b[1].won / b[1].heard - a[1].won / a[1].heard).map(([name, row]) => {
        const line = make("tr");
        line.append(make("td", name), make("td", row.won), make("td", row.heard));
        return line;
      }),
    );
    at("blind-start").focus();
  }

  at("blind-start").addEventListener("click", startBlind);
  at("blind-end").addEventListener("click", endBlind);
  for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
  at("listening").addEventListener("keydown", (event) => {
    if (event.repeat && event.key === "Enter") event.preventDefault(); // a key that is held presses a button once
  });
  addEventListener("keydown", (event) => {
    if (event.repeat || at("blind").hidden || event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT/.test(event.target.tagName)) return;
    const key = event.key.toLowerCase();
    if (key === "1" || key === "2") {
      const audio = at(key === "1" ? "blind-a" : "blind-b");
      audio.paused ? audio.play() : audio.pause();
    } else if ("abn".includes(key)) choose(key === "n" ? "none" : key);
  });
  at("save").addEventListener("click", () => {
    const text = JSON.stringify({ page: data.title, made: data.made, saved: new Date().toISOString(), choices: choices.map(({ names, ...rest }) => rest) }, null, 2);
    const anchor = make("a", null, { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "choices.json" });
    anchor.click();
    URL.revokeObjectURL(anchor.href);
  });

  at("mean").textContent = Math.max(1, ...runs.map((run) => run.steps_per_point));

  // ---- what failed

  const failed = runs.filter((run) => run.error);
  at("failed").hidden = !failed.length;
  for (const run of failed) {
    const name = run.name || Object.entries(run.settings).map(([k, v]) => `${k}=${v}`).join(" ");
    at("errors").append(make("dt", `${name} (${run.status})`), make("dd", run.error));
  }

  drawTable();
  drawCharts();
  drawPlayers();
})();
