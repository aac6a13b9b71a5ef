"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // Another run's report, to show tests side by side; most pages have none.
  const other = document.getElementById("before");
  const earlier = new Map((other ? JSON.parse(other.textContent).tests : []).map((test) => [test.nodeid, test]));
  const SIZE = 25;
  const byId = (id) => document.getElementById(id);

  // Text reaches the page as text alone: nothing here reads it as HTML.
  function el(name, options = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(options)) {
      if (key === "class") node.className = value;
      else if (key === "click") node.addEventListener("click", value);
      else node.setAttribute(key, value);
    }
    node.append(...children.map((each) => (each instanceof Node ? each : String(each))));
    return node;
  }
  function svg(name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }
  const collator = new Intl.Collator("en", { numeric: true });
  const natural = (a, b) => collator.compare(a, b);
  function bytes(number) {
    if (!number) return "0 B";
    let value = Math.abs(number), unit = 0;
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
    return (number < 0 ? "-" : "") + (unit ? Number(value.toFixed(2)) : value) + " " + units[unit];
  }
  function grid(heads, rows) {
    const head = el("tr", {}, ...heads.map(([text, n]) => el("th", { class: n ? "n" : "", scope: "col" }, text)));
    // A narrow page shows a row as lines, each with its column's head.
    const lines = rows.map((row) => el("tr", {}, ...row.map((cell, i) => {
      const made = cell instanceof Node && cell.tagName === "TD" ? cell : el("td", { class: heads[i][1] ? "n" : "wide" }, cell);
      made.dataset.head = heads[i][0];
      return made;
    })));
    return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...lines)));
  }
  // A table that is wider than the page can be scrolled by the keyboard too.
  function reach() {
    for (const each of document.querySelectorAll(".scroll")) {
      if (each.scrollWidth > each.clientWidth) each.setAttribute("tabindex", "0");
      else each.removeAttribute("tabindex");
    }
  }

  const rows = data.tests.map((test) => {
    let top = null;
    for (const each of test.figures) {
      const better = top === null || (each.phase === "call") > (top.phase === "call") ||
        (each.phase === top.phase && each.peak_allocated_bytes > top.peak_allocated_bytes);
      if (better) top = each;
    }
    const figure = (name) => (top === null ? 0 : top[name]);
    return { test, nodeid: test.nodeid, outcome: test.outcome, seconds: test.seconds,
      allocated: figure("peak_allocated_bytes"), reserved: figure("peak_reserved_bytes"),
      left: figure("end_allocated_bytes"), ooms: figure("num_ooms"),
      // The share of its tightest limit that a test used; -1 sorts those without below all others.
      used: Math.max(-1, ...test.limits.map((l) => (l.limit_bytes ? l.measured_bytes / l.limit_bytes : l.held ? 0 : Infinity))),
      broken: test.limits.filter((l) => !l.held).length };
  });
  const columns = [["nodeid", "test", false], ["outcome", "outcome", false], ["allocated", "peak allocated", true],
    ["reserved", "peak reserved", true], ["left", "left", true], ["used", "of limit", true], ["ooms", "OOMs", true], ["seconds", "seconds", true]];
  let order = { key: "allocated", down: true }, page = 0, chosen = null;

  function shown() {
    const text = byId("filter").value.toLowerCase(), outcome = byId("outcome").value;
    const list = rows.filter((row) => row.nodeid.toLowerCase().includes(text) && (!outcome || row.outcome === outcome));
    const sign = order.down ? -1 : 1;
    return list.sort((a, b) => {
      const x = a[order.key], y = b[order.key], names = natural(a.nodeid, b.nodeid);
      if (order.key === "nodeid") return sign * names;
      if (x === y) return names;
      return x < y ? -sign : sign;
    });
  }
  function draw() {
    const list = shown(), pages = Math.max(1, Math.ceil(list.length / SIZE));
    page = Math.min(page, pages - 1);
    const head = byId("tests").tHead.rows[0];
    head.replaceChildren(...columns.map(([key, title, n]) => {
      const active = order.key === key;
      const arrow = active ? (order.down ? " ▼" : " ▲") : "";
      const button = el("button", { type: "button", click: () => {
        order = { key, down: active ? !order.down : n };
        page = 0;
        draw();
      } }, title + arrow);
      const sort = active ? (order.down ? "descending" : "ascending") : "none";
      return el("th", { class: n ? "n" : "", scope: "col", "aria-sort": sort }, button);
    }));
    byId("tests").tBodies[0].replaceChildren(...list.slice(page * SIZE, page * SIZE + SIZE).map((row) => {
      const name = el("button", { type: "button", class: "name", click: () => open(row) }, row.nodeid);
      const bad = row.outcome === "failed" || row.outcome === "error";
      const line = el("tr", { class: row === chosen ? "chosen" : "" }, el("td", { class: "wide" }, name),
        el("td", { class: bad ? "bad" : row.outcome === "passed" ? "good" : "" }, row.outcome),
        ...["allocated", "reserved", "left"].map((key) => el("td", { class: "n" }, bytes(row[key]))),
        el("td", { class: row.broken ? "n bad" : "n" }, row.used < 0 ? "–" : row.used === Infinity ? "broken" : Math.round(row.used * 100) + " %"),
        el("td", { class: "n" }, row.ooms), el("td", { class: "n" }, row.seconds.toFixed(2)));
      columns.forEach(([, title], i) => { line.cells[i].dataset.head = title; });
      return line;
    }));
    byId("count").textContent = list.length + " of " + rows.length + " tests";
    reach();
    byId("page").textContent = "page " + (page + 1) + " of " + pages;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= pages - 1;
  }

  // The kinds of bytes from the bottom of a stack upwards; each has a colour of its own.
  const KINDS = ["weights", "gradients", "optimiser", "cache", "workspaces", "activations", "unnamed"];
  const colour = (kind) => "var(--" + kind + ")";
  // A picture is drawn for the room that it has, so that its text keeps its size.
  const room = () => Math.max(300, byId("detail").clientWidth - 42);
  // Round ticks: bytes by powers of two, counts by 1, 2 or 5 times a power of ten.
  const byteTick = (top, most) => 2 ** Math.ceil(Math.log2(Math.max(1, top / most)));
  function countTick(top, most) {
    const least = Math.max(1, top / most), power = 10 ** Math.floor(Math.log10(least));
    return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least);
  }
  const highestOf = (card) => Math.max(1, ...card.points.map((p) => Math.max(p[1], p[2])));
  function timeline(card, W = room(), highest = highestOf(card)) {
    const H = 250, left = 74, bottom = 40, right = 10;
    const points = card.points, last = Math.max(1, card.num_events);
    // A budget far above the curves is told in words, else it would flatten them.
    const near = card.budget_bytes !== null && card.budget_bytes <= 4 * highest;
    const top = (near ? Math.max(highest, card.budget_bytes) : highest) * 1.06;
    const x = (event) => left + (event / last) * (W - left - right);
    const y = (value) => H - bottom - (value / top) * (H - bottom - 16);
    const kinds = card.kinds || {}, ooms = card.ooms || [];
    const shown = KINDS.filter((kind) => kinds[kind]);
    const root = svg("svg", { viewBox: "0 0 " + W + " " + H, role: "img",
      "aria-label": "Bytes of cuda:" + card.device_index + " over " + card.num_events + " allocations and releases: at most " + bytes(card.peak_bytes) +
        " allocated" + (card.budget_bytes === null ? "" : ", budget " + bytes(card.budget_bytes)) + (ooms.length ? ", " + ooms.length + " failed allocations" : "") });
    const tick = byteTick(top, 5);
    for (let value = 0; value <= top; value += tick) {
      root.append(svg("line", { x1: left, x2: W - right, y1: y(value), y2: y(value), stroke: "var(--line)" }));
      root.append(svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, bytes(value)));
    }
    const step = countTick(last, W / 110);
    for (let event = 0; event <= last; event += step) {
      root.append(svg("line", { x1: x(event), x2: x(event), y1: y(0), y2: y(0) + 4, stroke: "var(--soft)" }));
      root.append(svg("text", { x: x(event), y: H - bottom + 17, "text-anchor": "middle" }, event));
    }
    root.append(svg("text", { x: W - right, y: H - 4, "text-anchor": "end" }, "allocations and releases"));
    const steps = (value) => points.map((p, i) => (i ? "H" + x(p[0]) : "M" + x(0) + " " + y(value(i)) + "H" + x(p[0])) + "V" + y(value(i))).join("");
    if (points.length) {
      // Each area goes down to the axis and hides the lower part of the one drawn before it.
      const below = (k, i) => shown.slice(0, k + 1).reduce((sum, kind) => sum + kinds[kind][i], 0);
      for (let k = shown.length - 1; k >= 0; k -= 1) {
        const path = svg("path", { d: steps((i) => below(k, i)) + "V" + y(0) + "H" + x(0) + "Z", fill: colour(shown[k]), stroke: "var(--card)", "stroke-width": 0.5 });
        path.append(svg("title", {}, shown[k]));
        root.append(path);
      }
      if (!shown.length) root.append(svg("path", { d: steps((i) => points[i][1]) + "V" + y(0) + "H" + x(0) + "Z", fill: colour("unnamed") }));
      root.append(svg("path", { d: steps((i) => points[i][2]), fill: "none", stroke: "var(--text)", "stroke-width": 1.5, "stroke-dasharray": "6 3" }));
    }
    if (near) root.append(svg("line", { x1: left, x2: W - right, y1: y(card.budget_bytes), y2: y(card.budget_bytes), stroke: "var(--bad)", "stroke-width": 2 }));
    // Marks that are near to each other have one label.
    const labels = [];
    for (const event of ooms) {
      root.append(svg("line", { x1: x(event), x2: x(event), y1: 14, y2: y(0), stroke: "var(--bad)", "stroke-width": 1.5, "stroke-dasharray": "2 3" }));
      const near = labels.length ? labels[labels.length - 1] : null;
      if (near && x(event) - near.x < 64) near.count += 1;
      else labels.push({ x: x(event), count: 1 });
    }
    for (const label of labels) {
      root.append(svg("text", { x: Math.min(label.x, W - 30), y: 11, class: "oom", "text-anchor": "middle" }, label.count > 1 ? label.count + " OOMs" : "OOM"));
    }
    return root;
  }
  function legend(card) {
    const kinds = card.kinds || {}, ooms = card.ooms || [];
    const parts = KINDS.filter((kind) => kinds[kind]).reverse().map((kind) => swatch(colour(kind), kind, "area"));
    if (!parts.length) parts.push(swatch(colour("unnamed"), "allocated", "area"));
    parts.push(swatch("var(--text)", "reserved", "dashed"));
    parts.push(card.budget_bytes === null ? el("span", {}, "no budget") : swatch("var(--bad)", "budget " + bytes(card.budget_bytes), "line"));
    if (ooms.length) parts.push(swatch("var(--bad)", ooms.length === 1 ? "a failed allocation" : ooms.length + " failed allocations", "dotted"));
    return el("div", { class: "legend" }, ...parts);
  }
  function swatch(paint, text, form) {
    const mark = el("i", { class: form });
    mark.style.color = paint;
    return el("span", {}, mark, text);
  }
  // A site is told by its beginning, an owner by its end.
  function cut(text, room) {
    const at = text.lastIndexOf(" of ");
    const own = at > 0 && !text.slice(0, at).includes(":") ? text.slice(0, at) : "";
    if (own) return own.length > room ? "…" + own.slice(own.length - room + 1) : own;
    return text.length > room ? text.slice(0, room - 1) + "…" : text;
  }
  // Squarified in one level: rows of blocks, each as near to a square as its row allows.
  function treemap(groups) {
    const W = room(), H = 220, total = groups.reduce((sum, g) => sum + g.bytes, 0);
    const root = svg("svg", { viewBox: "0 0 " + W + " " + H, role: "img", "aria-label": "What was live at the peak, by size; the table below has the same" });
    let rest = groups.map((g) => ({ g, area: (g.bytes / total) * W * H })).sort((a, b) => b.area - a.area);
    let x = 0, y = 0, w = W, h = H;
    const worst = (row, side) => {
      const sum = row.reduce((s, r) => s + r.area, 0);
      return Math.max(...row.map((r) => Math.max((side * side * r.area) / (sum * sum), (sum * sum) / (side * side * r.area))));
    };
    while (rest.length) {
      const side = Math.min(w, h);
      let n = 1;
      while (n < rest.length && worst(rest.slice(0, n + 1), side) <= worst(rest.slice(0, n), side)) n += 1;
      const row = rest.slice(0, n), sum = row.reduce((s, r) => s + r.area, 0), thick = sum / side;
      let along = 0;
      for (const r of row) {
        const long = r.area / thick;
        const box = w >= h ? [x, y + along, thick, long] : [x + along, y, long, thick];
        const part = svg("g", {});
        part.append(svg("title", {}, bytes(r.g.bytes) + ", " + (r.g.kind || "unnamed") + ": " + r.g.site));
        part.append(svg("rect", { x: box[0], y: box[1], width: Math.max(0, box[2]), height: Math.max(0, box[3]), fill: colour(r.g.kind || "unnamed"), stroke: "var(--card)", "stroke-width": 2 }));
        const room = Math.floor((box[2] - 14) / 7);
        if (room >= 8 && box[3] > 22) {
          part.append(svg("text", { x: box[0] + 7, y: box[1] + 17, class: "in" }, bytes(r.g.bytes)));
          if (box[3] > 40) part.append(svg("text", { x: box[0] + 7, y: box[1] + 34, class: "in" }, cut(r.g.site, room)));
        }
        root.append(part);
        along += long;
      }
      if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
      rest = rest.slice(n);
    }
    return root;
  }
  // Sites down, verdicts across: how the faults at each site ended.
  function sweep(each) {
    const names = [...new Set(each.sites.flatMap((row) => Object.keys(row.verdicts)))];
    const good = new Set(each.recover ? ["recovered"] : ["recovered", "clean OOM"]);
    names.sort((a, b) => good.has(b) - good.has(a) || natural(a, b));
    const heads = [["site", 0], ["allocations", 1], ["failed here", 1], ...names.map((name) => [name, 1])];
    const lines = each.sites.map((row) => [row.site || "unknown site", row.allocations, row.failed,
      ...names.map((name) => {
        const count = row.verdicts[name];
        return el("td", { class: count ? (good.has(name) ? "n cell fine" : "n cell broken") : "n" }, count ? (good.has(name) ? "✓ " : "✗ ") + count : "–");
      })]);
    const out = [el("h3", {}, "Sweep of " + each.name), el("p", { class: "soft" }, each.points + " faults tried, " + each.failures + " ended badly; a row for each site, a column for each verdict"),
      grid(heads, lines)];
    for (const line of each.replays) out.push(el("p", {}, line.points + " × " + line.verdict + ": ", el("code", {}, line.command)));
    return out;
  }
  // Budgets become smaller from step to step: the outline is the budget, the bar what was reserved.
  const RUNGS = ["weights", "gradients", "optimiser", "cache", "workspaces", "activations"];
  function staircase(steps) {
    const W = room(), line = 46, H = steps.length * line + 24, rungs = [...new Set(steps.map((s) => s.rung))];
    const largest = Math.max(1, ...steps.map((s) => Math.max(s.budget_bytes || 0, s.peak_reserved_bytes)));
    const root = svg("svg", { viewBox: "0 0 " + W + " " + H, role: "img", "aria-label": "The rung that each budget and fault leads to, and what was reserved; the table below has the same" });
    const width = (value) => (value / largest) * (W - 2);
    steps.forEach((s, i) => {
      const y = i * line + 16;
      const rung = s.problems.length ? "✗ " + s.rung : s.rung;
      root.append(svg("text", { x: 1, y: y, class: s.problems.length ? "oom" : "strong" }, cut(s.cause + " → " + rung, Math.floor(W / 7))));
      if (s.budget_bytes) root.append(svg("rect", { x: 1, y: y + 6, width: Math.max(1, width(s.budget_bytes)), height: 16, fill: "var(--bg)", stroke: "var(--soft)" }));
      root.append(svg("rect", { x: 1, y: y + 6, width: Math.max(2, width(s.peak_reserved_bytes)), height: 16, fill: s.problems.length ? "var(--bad)" : colour(RUNGS[rungs.indexOf(s.rung) % RUNGS.length]) }));
    });
    const tick = byteTick(largest, W / 110);
    for (let value = 0; value <= largest; value += tick) {
      root.append(svg("text", { x: Math.min(1 + width(value), W - 30), y: H - 2, "text-anchor": value ? "middle" : "start" }, bytes(value)));
    }
    const out = [el("h3", {}, "Fallback: where each budget and fault leads"), root,
      el("div", { class: "legend" }, ...rungs.map((rung, i) => swatch(colour(RUNGS[i % RUNGS.length]), rung, "area")), swatch("var(--soft)", "budget", "outline")),
      grid([["budget or fault", 0], ["rung", 0], ["reserved", 1], ["left", 1], ["OOMs", 1]],
        steps.map((s) => [s.cause, s.rung, bytes(s.peak_reserved_bytes), bytes(s.left_bytes), s.num_ooms]))];
    for (const s of steps) for (const problem of s.problems) out.push(el("p", { class: "bad" }, s.cause + ": " + problem));
    return out;
  }
  // The model's class is said once, at the group.
  function shortened(owner, site) {
    const at = owner.lastIndexOf(" of ");
    return at > 0 && site.endsWith(owner.slice(at)) ? owner.slice(0, at) : owner;
  }
  // A test beside the same test of the other report: timelines, then the peak's kinds.
  function beside(then, now) {
    const out = [el("h3", {}, "Before and now")];
    const cards = (test) => new Map((test.timeline || []).map((card) => [card.device_index, card]));
    const [old, recent] = [cards(then), cards(now)];
    for (const index of new Set([...old.keys(), ...recent.keys()])) {
      // One scale for both.
      const scale = Math.max(...[old.get(index), recent.get(index)].filter(Boolean).map(highestOf));
      const half = Math.max(300, window.innerWidth > 900 ? room() / 2 - 12 : room());
      const part = (word, card) => el("div", {}, el("h4", {}, "cuda:" + index + ", " + word),
        ...(card ? [timeline(card, half, scale), legend(card)] : [el("p", { class: "soft" }, "no timeline")]));
      out.push(el("div", { class: "pair" }, part("before", old.get(index)), part("now", recent.get(index))));
    }
    const lines = [];
    for (const f of now.figures) {
      const was = then.figures.find((each) => each.phase === f.phase && each.device_index === f.device_index);
      if (!was) continue;
      const row = (name, a, b) => lines.push([f.phase + ", cuda:" + f.device_index, name, bytes(a), bytes(b),
        el("td", { class: b > a ? "n bad" : b < a ? "n good" : "n" }, (b > a ? "+" : "") + bytes(b - a))]);
      row("peak allocated", was.peak_allocated_bytes, f.peak_allocated_bytes);
      for (const kind of KINDS) {
        const [a, b] = [(was.kinds || {})[kind] || 0, (f.kinds || {})[kind] || 0];
        if (a || b) row("of it " + kind, a, b);
      }
      row("peak reserved", was.peak_reserved_bytes, f.peak_reserved_bytes);
    }
    if (lines.length) out.push(grid([["phase", 0], ["bytes", 0], ["before", 1], ["now", 1], ["Δ", 1]], lines));
    return out;
  }
  function detail(test) {
    const out = [el("h2", { tabindex: "-1" }, test.nodeid), el("p", { class: "soft" }, test.environment + (test.host ? ", on " + test.host : ""))];
    if (test.broken_limit) out.push(el("p", { class: "bad" }, test.broken_limit));
    if (test.incident) out.push(el("p", { class: "bad" }, test.incident));
    if (test.unknown) out.push(el("p", { class: "soft" }, "Process bytes are not known: " + test.unknown));
    if (test.peak_host_bytes) out.push(el("p", { class: "soft" }, "The process held at most " + bytes(test.peak_host_bytes) + " of the host's memory."));
    if (test.waited_s) out.push(el("p", { class: "soft" }, "Waited " + test.waited_s.toFixed(1) + " s for its bytes of the cards."));
    if (test.contention) {
      const c = test.contention;
      out.push(el("p", {}, "An OOM under contention: " + bytes(c.needed_bytes) + " needed on cuda:" + c.device_index +
        ", others held " + bytes(c.others_bytes) + (c.share_bytes === null ? "" : ", this worker's share was " + bytes(c.share_bytes)) + "; at " + c.site));
    }
    if (earlier.has(test.nodeid)) out.push(...beside(earlier.get(test.nodeid), test));
    if (test.limits.length) {
      out.push(el("h3", {}, "Limits"), grid([["metric", 0], ["card", 0], ["phase", 0], ["limit", 1], ["measured", 1], ["result", 1]],
        test.limits.map((l) => [l.metric, l.metric === "host" ? "–" : l.device_index === null ? "all" : "cuda:" + l.device_index, l.phase, bytes(l.limit_bytes), bytes(l.measured_bytes),
          el("td", { class: l.held ? "n good" : "n bad" }, l.held ? "held" : l.measured_bytes > l.limit_bytes ? "broken" : "not known")])));
    }
    if (test.timeline === null) out.push(el("p", { class: "soft" }, "No timeline: the test ended the recording of the card's memory, or used no card while it was kept."));
    for (const card of test.timeline || []) {
      if (!earlier.has(test.nodeid)) out.push(el("h3", {}, "cuda:" + card.device_index + " over time"), timeline(card), legend(card));
      if (card.live_at_peak.length) {
        out.push(el("h3", {}, "Live at the peak, " + bytes(card.peak_bytes)), treemap(card.live_at_peak),
          grid([["owner or site", 0], ["blocks", 1], ["bytes", 1]], card.live_at_peak.map((g) => [
            el("div", {}, g.site, ...(g.largest || []).map((l) => el("div", { class: "soft small" }, bytes(l.bytes) + "  " + shortened(l.owner, g.site)))),
            g.blocks || "", bytes(g.bytes)])));
      }
    }
    for (const each of test.fallbacks) out.push(...staircase(each));
    for (const each of test.sweeps) out.push(...sweep(each));
    const split = test.figures.filter((f) => f.kinds && Object.keys(f.kinds).length);
    if (split.length) {
      const kinds = KINDS.filter((kind) => split.some((f) => f.kinds[kind]));
      out.push(el("h3", {}, "Allocated at each phase's peak, by kind"), grid([["phase", 0], ["card", 0], ...kinds.map((kind) => [kind, 1]), ["context, besides", 1]],
        split.map((f) => [f.phase, "cuda:" + f.device_index, ...kinds.map((kind) => bytes(f.kinds[kind] || 0)), bytes(f.context_bytes)])));
    }
    if (test.figures.length) {
      out.push(el("h3", {}, "Figures"), grid([["phase", 0], ["card", 0], ["allocated", 1], ["reserved", 1], ["requested", 1], ["active", 1], ["process", 1], ["fragmented", 1], ["left", 1], ["OOMs", 1], ["retries", 1]],
        test.figures.map((f) => [f.phase, "cuda:" + f.device_index, bytes(f.peak_allocated_bytes), bytes(f.peak_reserved_bytes), bytes(f.peak_requested_bytes),
          bytes(f.peak_active_bytes), f.peak_process_bytes === null || f.peak_process_bytes === undefined ? "–" : bytes(f.peak_process_bytes),
          f.peak_fragmented_bytes === null || f.peak_fragmented_bytes === undefined ? "–" : bytes(f.peak_fragmented_bytes), bytes(f.end_allocated_bytes), f.num_ooms, f.num_alloc_retries])));
    }
    for (const each of test.shrunk_batches || []) {
      out.push(el("p", {}, `The batch of ${each.function} was shrunk from ${each.first} to ${each.last}, as memory ran out.`));
    }
    if (test.fixtures.length) {
      out.push(el("h3", {}, "Fixtures of wider scope"), grid([["fixture", 0], ["scope", 0], ["bytes", 1]], test.fixtures.map((f) => [f.name, f.scope, bytes(f.bytes)])));
    }
    byId("detail").replaceChildren(...out);
    reach();
  }

  function open(row) {
    chosen = row;
    draw();
    detail(row.test);
    byId("detail").scrollIntoView({ block: "start" });
    byId("detail").querySelector("h2").focus({ preventScroll: true });
  }
  const isBad = (row) => row.outcome === "failed" || row.outcome === "error";
  const bad = rows.filter(isBad), failed = bad.length;
  // What broke first, each cause once: tests that fail alike are one thing to mend.
  function cause(row) {
    const test = row.test;
    const limit = test.limits.find((l) => !l.held);
    if (limit) return ["Above a limit", limit.metric === "leak" ? "left on the card after the test" : "peak " + limit.metric + ", limit " + bytes(limit.limit_bytes)];
    if (test.broken_limit) return ["Above the baseline", test.broken_limit.split(":")[0]];
    if (test.site) return ["Out of memory", test.site];
    if (test.incident) return ["Out of memory", test.incident];
    if (test.sweeps.some((each) => each.failures)) return ["Faults of a sweep ended badly", "see each test's matrix of sites and verdicts"];
    if (test.fallbacks.some((steps) => steps.some((step) => step.problems.length))) return ["A fallback is wrong", "see each test's staircase"];
    return ["Failed for another reason", "nothing about memory is known"];
  }
  function broke() {
    const causes = new Map();
    for (const row of bad) {
      const [kind, words] = cause(row), key = kind + "\n" + words;
      if (!causes.has(key)) causes.set(key, { kind, words, rows: [] });
      causes.get(key).rows.push(row);
    }
    const groups = [...causes.values()].sort((a, b) => b.rows.length - a.rows.length);
    const item = (row) => el("li", {}, el("button", { type: "button", class: "name", click: () => open(row) }, row.nodeid));
    const out = [];
    for (const group of groups) {
      const list = group.rows.sort((a, b) => natural(a.nodeid, b.nodeid));
      out.push(el("h3", { class: "bad" }, group.kind + ": " + list.length + (list.length === 1 ? " test" : " tests")), el("p", { class: "soft" }, group.words));
      out.push(el("ul", { class: "plain" }, ...list.slice(0, 5).map(item)));
      if (list.length > 5) out.push(el("details", {}, el("summary", {}, (list.length - 5) + " more"), el("ul", { class: "plain" }, ...list.slice(5).map(item))));
    }
    if (out.length) byId("broke").append(el("h2", {}, "What broke"), ...out);
  }
  broke();
  const largest = rows.reduce((most, row) => Math.max(most, row.allocated), 0);
  const grown = data.baseline ? data.baseline.changes.filter((c) => c.is_regression).length : 0;
  function tile(value, text, target, prepare) {
    byId("tiles").append(el("button", { type: "button", class: "tile", click: () => {
      if (prepare) { prepare(); page = 0; draw(); }
      byId(target).scrollIntoView({ block: "start" });
    } }, el("b", {}, value), el("span", {}, text)));
  }
  const onlyFailed = () => { byId("outcome").value = bad.some((row) => row.outcome === "failed") ? "failed" : "error"; };
  tile(failed, failed === 1 ? "test broke" : "tests broke", failed ? "broke" : "all", failed ? onlyFailed : null);
  if (data.baseline) tile(grown, "above the baseline", "grew");
  tile(rows.reduce((sum, row) => sum + row.broken, 0), "limits broken", "all", () => { order = { key: "used", down: true }; });
  tile(bytes(largest), "largest peak", "all", () => { order = { key: "allocated", down: true }; });
  tile(rows.length, "tests on a card", "all", () => { byId("outcome").value = ""; byId("filter").value = ""; });
  const points = rows.reduce((sum, row) => sum + row.test.sweeps.reduce((s, each) => s + each.points, 0), 0);
  if (points) tile(points, "faults of sweeps", "all");
  // Pictures follow the page's width; print shows what is folded.
  let drawn = 0;
  window.addEventListener("resize", () => {
    reach();
    if (chosen && drawn !== room()) { drawn = room(); detail(chosen.test); }
  });
  window.addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((each) => { each.open = true; each.dataset.printed = ""; }));
  window.addEventListener("afterprint", () => document.querySelectorAll("details[data-printed]").forEach((each) => { each.open = false; delete each.dataset.printed; }));
  // The first ten, the others folded, the hundred largest at most.
  function listed(heads, list, line) {
    const parts = [grid(heads, list.slice(0, 10).map(line))];
    const rest = list.slice(10, 100);
    if (rest.length) parts.push(el("details", {}, el("summary", {}, rest.length + " more"), grid(heads, rest.map(line))));
    if (list.length > 100) parts.push(el("p", { class: "soft" }, "… and " + (list.length - 100) + " more in the JSON"));
    return parts;
  }
  if (data.baseline) {
    const changes = [...data.baseline.changes].sort((a, b) => Math.abs(b.now - b.before) - Math.abs(a.now - a.before));
    const heads = [["test", 0], ["metric", 0], ["before", 1], ["now", 1], ["before and now", 0], ["Δ", 1]];
    const most = Math.max(1, ...changes.map((c) => Math.max(c.before, c.now)));
    const rowOf = new Map(rows.map((row) => [row.nodeid, row]));
    function bars(c) {
      const root = svg("svg", { viewBox: "0 0 120 16", "aria-hidden": "true", class: "bars" });
      root.append(svg("rect", { x: 0, y: 1, width: Math.max(1, (c.before / most) * 120), height: 6, fill: "var(--unnamed)" }));
      root.append(svg("rect", { x: 0, y: 9, width: Math.max(1, (c.now / most) * 120), height: 6, fill: c.now > c.before ? "var(--bad)" : "var(--good)" }));
      return root;
    }
    const named = (name) => (rowOf.has(name) ? el("button", { type: "button", class: "name", click: () => open(rowOf.get(name)) }, name) : name);
    const line = (c) => [named(c.test), c.metric, bytes(c.before), bytes(c.now), bars(c),
      el("td", { class: c.is_regression ? "n bad" : c.now < c.before ? "n good" : "n" }, (c.now > c.before ? "+" : "") + bytes(c.now - c.before))];
    const above = changes.filter((c) => c.is_regression), others = changes.filter((c) => !c.is_regression);
    const out = [el("p", { class: "soft" }, above.length + " above what is allowed, " + others.length + " other changes, " +
      data.baseline.new.length + " new, " + data.baseline.stale.length + " stale")];
    if (above.length) out.push(...listed(heads, above, line));
    if (others.length) out.push(el("details", earlier.size ? { open: "" } : {}, el("summary", {}, "Changed within what is allowed, or less: " + others.length), ...listed(heads, others, line)));
    for (const [list, title] of [[data.baseline.new, "New, not in the baseline"], [data.baseline.stale, "Stale: in the baseline, and no more or without a card"]]) {
      if (!list.length) continue;
      out.push(el("details", {}, el("summary", {}, title + ": " + list.length), ...listed([["test", 0], ["peaks", 0], ["environment", 0]],
        [...list].sort((a, b) => natural(a.test, b.test)),
        (e) => [e.test, Object.entries(e.peaks).filter(([name]) => /(allocated|reserved)$/.test(name)).map(([name, n]) => name + " " + bytes(n)).join(", "), e.environment])));
    }
    byId("changes").append(...out);
  }
  for (const outcome of [...new Set(rows.map((row) => row.outcome))].sort()) byId("outcome").append(el("option", { value: outcome }, outcome));
  byId("filter").addEventListener("input", () => { page = 0; draw(); });
  byId("outcome").addEventListener("change", () => { page = 0; draw(); });
  byId("previous").addEventListener("click", () => { page -= 1; draw(); });
  byId("next").addEventListener("click", () => { page += 1; draw(); });
  chosen = bad[0] || shown()[0] || null;
  draw();
  if (chosen) detail(chosen.test);
})();
