// Draws the charts of #data into the page, and again whenever a control changes or either is
// replaced: window.normlab.draw(). Nothing is fetched. What the controls say is kept in the
// address, after #, so that a link shows what its sender saw.
"use strict";
window.normlab = (() => {
  const AXES = {
    epochs: {field: "epochs", title: "epoch"},
    steps: {field: "step", title: "step"},
    seconds: {
      field: "seconds",
      title: "seconds (a step's mean time × steps, evaluation included)",
    },
  };
  const SPLITS = {train: "training", validation: "validation", test: "test"};
  const NARROW = 640;

  let state = null;      // What the controls say, as in the address; null: as the page has them.
  let defaults = "";     // What they say in a page that nobody has touched.
  let views = [];
  let queue = Promise.resolve();

  const controls = () => document.getElementById("controls");
  const read = form => new URLSearchParams(new FormData(form)).toString();
  const pageData = () => JSON.parse(document.getElementById("data").textContent);

  function fromAddress() {
    const text = location.hash.slice(1);
    if (new URLSearchParams(text).has("x")) state = text;
  }

  function apply(form, text) {
    const said = new URLSearchParams(text);
    for (const input of form.elements) {
      if (input.name) input.checked = said.getAll(input.name).includes(input.value);
    }
  }

  function keep() {
    state = read(controls());
    const address = state === defaults ? location.pathname + location.search : "#" + state;
    history.replaceState(null, "", address);
  }

  // What the controls say, for the curves.
  function wanted(form) {
    const said = new FormData(form);
    return {
      metrics: said.getAll("metric"), arms: said.getAll("arm"), splits: said.getAll("split"),
      x: said.get("x"), logX: said.has("log-x"), logY: said.has("log-y"), seeds: said.has("seeds"),
      together: said.has("together"),
    };
  }

  // Data comes as columns.
  function rows(columns) {
    const keys = Object.keys(columns);
    return (columns[keys[0]] ?? []).map(
      (_, i) => Object.fromEntries(keys.map(key => [key, columns[key][i]])));
  }

  function unpacked(spec) {
    const datasets = Object.entries(spec.datasets ?? {}).map(([name, one]) => [name, rows(one)]);
    return {...spec, datasets: Object.fromEntries(datasets)};
  }

  // The course of every seed that the curves' means are of, in the curves' own terms.
  function seedRows(runs, metric) {
    const found = [];
    for (const run of runs) {
      for (const course of run.courses.filter(one => one.reported)) {
        for (const {split, value} of course.values.filter(one => one.metric === metric)) {
          if (!(split in SPLITS)) continue;
          course.step.forEach((step, i) => value[i] !== null && found.push({
            run: run.run, arm: course.arm, lr: course.lr, weight_decay: course.weight_decay,
            seed: course.seed, status: course.status, split: SPLITS[split], step,
            epochs: step / Math.max(run.per_epoch, 1), epoch: course.epoch[i],
            seconds: course.pace === null ? null : course.pace * step, value: value[i],
          }));
        }
      }
    }
    return found;
  }

  // A chart of curves as the controls want it.
  function curves(spec, metric, runs, want, room) {
    const several = runs.length > 1;
    const axis = AXES[want.x];
    const logY = want.logY && metric === "loss";
    const [name, means] = Object.entries(spec.datasets).find(([, one]) => one.length > 0) ?? [];
    if (!name && !want.seeds) return spec;

    const panel = row => several && !want.together ? `${row.run} · ${row.split}` : row.split;
    let shown = [...(means ?? []), ...(want.seeds ? seedRows(runs, metric) : [])]
      .filter(row => want.arms.includes(row.arm) && want.splits.includes(row.split))
      .filter(row => row[axis.field] !== null && !(want.logX && row[axis.field] <= 0))
      .map(row => ({...row, panel: panel(row)}));
    if (logY) {
      // A band may reach below zero, which has no logarithm.
      const least = Math.min(...shown.flatMap(row => [row.low, row.mean, row.value])
        .filter(value => value > 0));
      shown = shown.map(row => row.low <= 0 ? {...row, low: least} : row);
    }

    const order = Object.values(SPLITS).flatMap(split => several && !want.together
      ? runs.map(run => `${run.run} · ${split}`) : [split]);
    const panels = order.filter(one => shown.some(row => row.panel === one));
    const most = several && !want.together ? Math.min(runs.length, 3) : 3;
    const columns = room < NARROW ? 1 : Math.max(Math.min(panels.length, most), 1);

    const x = {field: axis.field, type: "quantitative", title: axis.title};
    if (want.logX) x.scale = {type: "log", nice: false};
    else if (want.x === "epochs") x.axis = spec.spec.layer[1].encoding.x.axis;
    else x.scale = {zero: false};
    const layers = spec.spec.layer.map(layer => {
      const encoding = {...layer.encoding, x};
      if (several && want.together && layer.mark.type === "line") {
        encoding.strokeDash = {field: "run", type: "nominal", sort: runs.map(run => run.run),
                               legend: {title: null, orient: "top"}};
      }
      if (several && want.together) encoding.detail = {field: "run", type: "nominal"};
      if (logY) encoding.y = {...encoding.y, scale: {type: "log", nice: false}};
      return {...layer, encoding, transform: [{filter: "!isValid(datum.seed)"}]};
    });
    // Below the means, and the fainter the more there are.
    if (want.seeds) layers.splice(1, 0, seedLines(layers[1], metric, several, runs));
    return {
      ...spec,
      datasets: {...spec.datasets, curves: shown},
      data: {name: "curves"},
      facet: {field: "panel", type: "nominal", title: null, sort: panels},
      columns,
      spec: {...spec.spec, layer: layers, width: Math.floor((room - 62) / columns) - 22},
    };
  }

  function seedLines(line, metric, several, runs) {
    const seeds = Math.max(...runs.map(run => new Set(run.courses.map(one => one.seed)).size), 1);
    const value = Math.min(0.5, Math.max(5 / seeds, 0.1));
    const format = metric === "accuracy" ? ".2%" : ".4f";
    const keys = [...(several ? ["run"] : []), "arm", "lr", "weight_decay", "seed", "status", "step"];
    const encoding = {
      ...line.encoding,
      y: {...line.encoding.y, field: "value"},
      detail: ["run", "seed", "lr", "weight_decay"].map(field => ({field, type: "nominal"})),
      opacity: {...line.encoding.opacity, condition: {...line.encoding.opacity.condition, value},
                value: value / 6},
      tooltip: [...keys.map(field => ({field, type: "nominal"})),
                {field: "value", type: "quantitative", format}],
    };
    return {mark: {type: "line", strokeWidth: 1}, encoding,
            transform: [{filter: "isValid(datum.seed)"}]};
  }

  // Another chart, no wider than there is room.
  function fitted(spec, room) {
    if (room >= NARROW) return spec;
    if (spec.hconcat) {
      const {hconcat, ...rest} = spec;
      return fitted({...rest, vconcat: hconcat}, room);
    }
    if (spec.vconcat) return {...spec, vconcat: spec.vconcat.map(one => fitted(one, room))};
    if (spec.facet) {
      const facet = spec.facet.column ?? spec.facet.row ?? spec.facet;
      return {...spec, facet, columns: 1, spec: {...spec.spec, width: room - 80}};
    }
    return {...spec, width: Math.min(spec.width ?? room, room - 120)};
  }

  // Titles wrap where there is no room for them on one line.
  function wrapped(spec, room) {
    if (typeof spec.title !== "object") return spec;
    // A line that ends with a space was broken where a wide page has no more room.
    const fold = text => [text].flat().join("\n").replaceAll(" \n", " ").split("\n").flatMap(line => {
      const most = Math.floor((room - 40) / 6);  // Beside the button that saves the chart.
      return line.match(new RegExp(`.{1,${most}}(?:\\s|$)|.{${most}}`, "g")) ?? [line];
    });
    const subtitle = spec.title.subtitle && fold(spec.title.subtitle);
    return {...spec, title: {...spec.title, text: fold(spec.title.text), subtitle}};
  }

  async function drawAll() {
    const data = pageData();
    const form = controls();
    if (form) {
      if (form.hidden) {
        form.hidden = false;
        defaults = read(form);
      }
      if (state !== null) apply(form, state);
    }
    const left = (data.runs ?? []).reduce((sum, run) => sum + run.left_out, 0);
    for (const one of document.querySelectorAll(".downloads")) {
      one.hidden = false;
      one.querySelector("span").textContent = left === 0 ? ""
        : `Without the measurements of ${left} replicas, for which this page has no room.`;
    }
    views.forEach(view => view.finalize());
    views = [];
    for (const [name, packed] of Object.entries(data.specs)) {
      const place = document.getElementById("chart-" + name);
      const figure = place.closest("figure");
      let spec = unpacked(packed);
      const label = spec.description ?? place.getAttribute("aria-label");
      const isCurves = form && data.curves.includes(name);
      if (isCurves) figure.hidden = !wanted(form).metrics.includes(name);
      if (figure.hidden) continue;
      const room = place.clientWidth;
      spec = isCurves ? curves(spec, name, data.runs, wanted(form), room) : fitted(spec, room);
      const {view} = await vegaEmbed(place, wrapped(spec, room), {
        actions: {export: true, source: false, compiled: false, editor: false},
        ast: true,  // Without eval, which the page's policy forbids.
        downloadFileName: `${data.name}-${name}`,
        logLevel: 1,  // Errors: a chart in which there is nothing yet is none.
        renderer: "svg",
      });
      views.push(view);
      place.classList.add("drawn");
      // The box neither scrolls any more nor stands for the chart: the drawing does.
      for (const attribute of ["tabindex", "role", "aria-label", "aria-roledescription"]) {
        place.removeAttribute(attribute);
      }
      const drawing = place.querySelector("svg.marks");
      drawing.setAttribute("viewBox", `0 0 ${drawing.getAttribute("width")} ${drawing.getAttribute("height")}`);
      drawing.setAttribute("role", "img");
      drawing.setAttribute("aria-label", label);
      // Its description stands for all of its parts.
      drawing.querySelector("g").setAttribute("aria-hidden", "true");
      place.querySelector("summary")?.setAttribute("aria-label", "Save this chart");
      // Vega makes the picture when a mouse goes down, which neither a key nor a finger waits for.
      for (const link of place.querySelectorAll(".vega-actions a")) {
        link.addEventListener("click", async event => {
          event.preventDefault();
          const kind = link.download.split(".").at(-1);
          saveAs(link.download, await view.toImageURL(kind, kind === "png" ? 2 : 1));
        });
      }
    }
  }

  function draw() {
    // One after the other: a chart that is being drawn is not drawn over.
    queue = queue.then(drawAll, drawAll);
    return queue;
  }

  // Tables of what the page carries.
  const MEASUREMENTS = ["arm", "lr", "seed", "weight_decay", "step", "epoch", "split", "metric",
                        "value", "time", "status"];

  function measurements(run) {
    return run.courses.flatMap(course => course.values.flatMap(({split, metric, value}) =>
      course.step.map((step, i) => ({
        run: run.run, ...course, split, metric, step, epoch: course.epoch[i], value: value[i],
        time: new Date(Math.round(course.time[i] * 1000)).toISOString(),
      })).filter(row => row.value !== null)));
  }

  function csv(columns, table) {
    const cell = value => {
      const text = String(value ?? "");
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [columns, ...table.map(row => columns.map(key => row[key]))]
      .map(line => line.map(cell).join(",") + "\n").join("");
  }

  function save(what) {
    const {name, runs} = pageData();
    const several = runs.length > 1 ? ["run"] : [];
    const table = what === "measurements" ? runs.flatMap(measurements)
      : runs.flatMap(run => rows(run.replicas).map(row => ({run: run.run, ...row})));
    const columns = what === "measurements" ? MEASUREMENTS
      : [...new Set(runs.flatMap(run => Object.keys(run.replicas)))];
    const text = csv([...several, ...columns], table);
    saveAs(`${name}-${what}.csv`, URL.createObjectURL(new Blob([text], {type: "text/csv"})));
  }

  function saveAs(name, address) {
    const link = document.createElement("a");
    link.href = address;
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }

  // The page's contents may be replaced, so the listeners are the document's.
  document.addEventListener("change", event => {
    if (event.target.form !== controls() || !controls()) return;
    keep();
    draw();
  });
  document.addEventListener("submit", event => event.preventDefault());
  document.addEventListener("reset", event => {
    // The form has its values after this event.
    if (event.target === controls()) setTimeout(() => { keep(); draw(); });
  });
  document.addEventListener("click", event => {
    const button = event.target.closest("[data-csv]");
    if (button) save(button.dataset.csv);
  });
  addEventListener("hashchange", () => { fromAddress(); draw(); });
  let width = document.documentElement.clientWidth;
  let timer;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    clearTimeout(timer);
    timer = setTimeout(draw, 200);
  });

  fromAddress();
  draw();
  return {draw};
})();
