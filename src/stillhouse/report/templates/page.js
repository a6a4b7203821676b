"use strict";
(() => {
  const PAGE = 10;
  const byId = (id) => document.getElementById(id);
  const keys = {};

  const dialog = byId("keys");
  const open = byId("keys-open");
  open.hidden = false;
  open.addEventListener("click", () => dialog.showModal());
  keys["?"] = () => dialog.showModal();
  keys.t = () => {
    window.scrollTo(0, 0);
    document.querySelector(".skip").focus();
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox") return;
    const act = Object.hasOwn(keys, event.key) ? keys[event.key] : null;
    if (!act) return;
    event.preventDefault();
    act();
  });

  const defaults = byId("config-defaults");
  if (defaults) {
    const show = () => {
      for (const table of document.querySelectorAll(".settings")) table.classList.toggle("given", !defaults.checked);
    };
    defaults.checked = false;
    defaults.addEventListener("change", show);
    keys.d = () => defaults.click();
    show();
  }

  const list = byId("answer-list");
  if (!list) return;
  const data = JSON.parse(byId("answer-data").textContent);
  const search = byId("answer-search");
  const order = byId("answer-order");
  const task = byId("answer-task");
  const more = byId("answer-more");
  const count = byId("answer-count");
  const first = byId("answer-first");
  const second = byId("answer-second");
  const tasks = [...new Set(data.rows.map((row) => row.task))];
  const hidden = new Set();
  let found = [];
  let shown = 0;
  let words = "";

  // All text goes in as text nodes: what a model wrote is never read as markup.
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.append(text);
    return element;
  };

  const marked = (tag, className, text) => {
    const element = make(tag, className);
    element.dir = "auto";
    if (!words) {
      element.append(text);
      return element;
    }
    const low = text.toLowerCase();
    let from = 0;
    // Some letters change their length in lower case; then positions do not fit and nothing is marked.
    let at = low.length === text.length ? low.indexOf(words) : -1;
    while (at >= 0) {
      element.append(text.slice(from, at), make("mark", "", text.slice(at, at + words.length)));
      from = at + words.length;
      at = low.indexOf(words, from);
    }
    element.append(text.slice(from));
    return element;
  };

  const score = (row, index) => {
    const response = row.responses[index];
    return response ? response[0] : null;
  };
  const mean = (row, role) => {
    const values = data.systems
      .map((system, index) => (system.role === role && !hidden.has(index) ? score(row, index) : null))
      .filter((value) => value !== null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  };
  const gain = (row) => {
    const before = data.systems.findIndex((system, index) => system.role === "before" && score(row, index) !== null);
    const after = mean(row, "after");
    return before < 0 || after === null ? null : after - score(row, before);
  };
  const apart = (row) => {
    const scores = data.systems
      .map((system, index) => (system.role === "after" && !hidden.has(index) ? score(row, index) : null))
      .filter((value) => value !== null);
    return scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : null;
  };
  // Of two systems, each by its number among the names; a name has an index for every task.
  const pairs = [];
  const scoreOf = (row, which) => {
    const index = (pairs[which] || []).find((one) => score(row, one) !== null);
    return index === undefined ? null : score(row, index);
  };
  const difference = (row) => {
    const [one, other] = [scoreOf(row, first.value), scoreOf(row, second.value)];
    return one === null || other === null ? null : one - other;
  };
  const comparing = () => order.value === "above" || order.value === "below";
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(Math.abs(value) < 1 ? 3 : 1)}`;
  const answers = (row, index) => (hidden.has(index) ? [] : row.responses[index]?.[2] || []);
  const longest = (row) =>
    Math.max(0, ...data.systems.flatMap((_, index) => answers(row, index).map((answer) => answer[0].length)));
  const orders = {
    gain: (row) => -gain(row),
    loss: (row) => gain(row),
    low: (row) => mean(row, "after"),
    high: (row) => -mean(row, "after"),
    apart: (row) => -apart(row),
    long: (row) => -longest(row),
    above: (row) => -difference(row),
    below: (row) => difference(row),
  };
  const known = {
    gain,
    loss: gain,
    low: (row) => mean(row, "after"),
    high: (row) => mean(row, "after"),
    apart: (row) => apart(row),
    long: () => 0,
    above: difference,
    below: difference,
  };

  const haystack = (row) => {
    if (row.hay === undefined) {
      const responses = Object.values(row.responses).flatMap((response) => response[2].map((answer) => answer[0]));
      row.hay = [row.id, row.prompt, ...row.references, ...responses].join("\n").toLowerCase();
    }
    return row.hay;
  };

  // Which answers there are to a prompt: one for each seed, temperature and sample of the systems shown.
  const variants = (row) => [
    ...new Set(data.systems.flatMap((_, index) => answers(row, index).map((answer) => answer[2]))),
  ];
  const firstMatch = (row, which) => {
    if (!words || [row.prompt, ...row.references].some((text) => text.toLowerCase().includes(words))) return which[0];
    const has = (label) => (_, index) =>
      answers(row, index).some((answer) => answer[2] === label && answer[0].toLowerCase().includes(words));
    return which.find((label) => data.systems.some(has(label)));
  };
  const say = (said, row, label, several) => {
    said.replaceChildren();
    data.systems.forEach((system, index) => {
      const own = answers(row, index);
      if (!own.length) return;
      const [text, facts, which] = own.find((answer) => answer[2] === label) || own[0];
      const box = make("div");
      box.style.setProperty("--dot", `var(${system.colour})`);
      const who = make("div", "who");
      who.append(make("bdi", "", system.label), make("span", "", facts));
      if (several && which !== label) who.append(make("span", "", data.labels[which]));
      if (own.length > 1 && row.responses[index][1]) who.append(make("span", "", row.responses[index][1]));
      box.append(who, text ? marked("p", "text", text) : make("p", "text soft", "(empty)"));
      said.append(box);
    });
  };

  const pictures = (images) => {
    const box = make("div", "pictures");
    for (const [location, thumbnail] of images) {
      if (!thumbnail) {
        box.append(make("span", "soft small", `${location}: no thumbnail kept`));
        continue;
      }
      const picture = make("img");
      picture.alt = picture.title = location;
      picture.src = thumbnail;
      box.append(picture);
    }
    return box;
  };

  const card = (row) => {
    const article = make("article", "card answer");
    article.tabIndex = -1;
    article.setAttribute("aria-label", `Prompt ${row.id}`);
    const head = make("div", "head");
    head.append(make("span", "", tasks.length > 1 && !row.id.startsWith(row.task) ? `${row.task} · ${row.id}` : row.id));
    if (comparing()) head.append(make("b", "apart", `difference ${signed(difference(row))}`));
    const pair = make("div", "pair");
    const prompt = make("div");
    prompt.append(make("div", "label", "Prompt"), marked("p", "text", row.prompt));
    if (row.images) prompt.append(pictures(row.images));
    pair.append(prompt);
    if (row.references.length) {
      const reference = make("div");
      reference.append(make("div", "label", row.references.length > 1 ? `${row.references.length} references` : "Reference"));
      reference.append(marked("p", "text", row.references.join("\n")));
      pair.append(reference);
    }
    const said = make("div", "said");
    article.append(head, pair, said);
    const which = variants(row);
    let at = Math.max(0, which.indexOf(firstMatch(row, which)));
    say(said, row, which[at], which.length > 1);
    if (which.length > 1) {
      const steps = make("span", "steps");
      const told = make("span");
      told.setAttribute("role", "status");
      const tell = () => {
        told.textContent = `${data.labels[which[at]]} (${at + 1} of ${which.length})`;
      };
      const step = (by) => {
        at = (at + by + which.length) % which.length;
        say(said, row, which[at], true);
        tell();
      };
      const button = (words, sign, by) => {
        const made = make("button", "", sign);
        made.type = "button";
        made.setAttribute("aria-label", words);
        made.addEventListener("click", () => step(by));
        return made;
      };
      steps.append(button("Previous response", "‹", -1), told, button("Next response", "›", 1));
      head.append(steps);
      article.step = step;
      tell();
    }
    return article;
  };

  const compared = () => {
    if (!comparing()) return "";
    const apart = found.map(difference);
    const times = (test) => apart.filter(test).length.toLocaleString("en");
    const mean = apart.reduce((sum, value) => sum + value, 0) / apart.length;
    const name = (select) => select.selectedOptions[0]?.textContent;
    return (
      `. ${name(first)} against ${name(second)}: higher on ${times((d) => d > 0)}, lower on ${times((d) => d < 0)}, ` +
      `equal on ${times((d) => d === 0)}; mean difference ${signed(mean)}`
    );
  };

  const showMore = () => {
    list.append(...found.slice(shown, shown + PAGE).map(card));
    shown = Math.min(found.length, shown + PAGE);
    more.hidden = shown >= found.length;
    const total = data.rows.length;
    const which = found.length === total ? `${total} prompts` : `${found.length} of ${total} prompts`;
    count.textContent = found.length ? `${which}, ${shown} shown${compared()}` : "Nothing found. Try fewer letters.";
  };

  const update = () => {
    words = search.value.trim().toLowerCase();
    found = data.rows.filter(
      (row) => (task.value === "" || row.task === task.value) && (!words || haystack(row).includes(words)),
    );
    const by = orders[order.value];
    if (by) {
      const measured = found.filter((row) => known[order.value](row) !== null);
      const keyed = measured.map((row) => [by(row), row]);
      keyed.sort((one, other) => one[0] - other[0]);
      found = keyed.map((pair) => pair[1]);
    }
    shown = 0;
    list.replaceChildren();
    showMore();
  };

  task.append(new Option("all", ""), ...tasks.map((name) => new Option(name, name)));
  byId("answer-task-label").hidden = tasks.length < 2;
  // A system that was measured on several tasks has one box.
  const same = new Map();
  data.systems.forEach((system, index) => {
    if (!data.rows.some((row) => row.responses[index])) return;
    const who = `${system.colour} ${system.label}`;
    same.set(who, [...(same.get(who) || []), index]);
  });
  for (const indices of same.values()) {
    const system = data.systems[indices[0]];
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => {
      for (const index of indices) {
        if (box.checked) hidden.delete(index);
        else hidden.add(index);
      }
      update();
    });
    const dot = make("span", "dot");
    dot.style.setProperty("--dot", `var(${system.colour})`);
    dot.style.margin = "0";
    label.append(box, dot, make("bdi", "", system.label));
    byId("answer-systems").append(label);
    for (const select of [first, second]) select.append(new Option(system.label, pairs.length));
    pairs.push(indices);
  }
  // The last two systems are what most readers want to compare.
  first.value = Math.max(0, pairs.length - 1);
  second.value = Math.max(0, pairs.length - 2);
  for (const value of ["above", "below"]) order.querySelector(`[value=${value}]`).hidden = pairs.length < 2;

  let wait;
  search.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(update, 120);
  });
  order.addEventListener("change", () => {
    for (const name of ["first", "second"]) byId(`answer-${name}-label`).hidden = !comparing();
    update();
  });
  first.addEventListener("change", update);
  second.addEventListener("change", update);
  task.addEventListener("change", update);
  more.addEventListener("click", () => {
    const first = shown;
    showMore();
    list.querySelectorAll(".answer")[first]?.focus();
  });
  byId("answer-controls").addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.preventDefault();
    clearTimeout(wait);
    search.value = "";
    update();
    list.querySelector(".answer")?.focus();
  });
  const move = (by) => {
    const cards = [...list.querySelectorAll(".answer")];
    const next = Math.max(0, cards.indexOf(document.activeElement?.closest(".answer")) + by);
    if (next < cards.length) {
      cards[next].focus();
    } else if (!more.hidden) {
      showMore();
      move(by);
    }
  };
  keys["/"] = () => search.focus();
  keys.j = () => move(1);
  keys.k = () => move(-1);
  const turn = (by) => {
    const cards = [...list.querySelectorAll(".answer")];
    const focused = document.activeElement?.closest(".answer");
    (focused || cards.find((one) => one.getBoundingClientRect().bottom > 80))?.step?.(by);
  };
  keys.l = () => turn(1);
  keys.h = () => turn(-1);
  byId("answer-steps").hidden = !data.rows.some((row) => variants(row).length > 1);
  keys.m = () => {
    if (!more.hidden) showMore();
  };
  byId("answer-keys").hidden = false;
  byId("answer-controls").hidden = false;
  update();
})();
