// A small Markdown that builds DOM nodes. Text only ever becomes text nodes: nothing a model writes is parsed as HTML.

const make = (tag, ...children) => {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
};

const SPAN = /(`+)([^`](?:.*?[^`])?)\1(?!`)|\*\*(?=\S)(.+?\S?)\*\*|(?<![\w*])\*(?=\S)([^*]+?)\*(?![\w*])|(?<!\w)_(?=\S)([^_]+?)_(?!\w)|\[([^\]]*)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>"')\]]+)/s;

function inline(text, depth = 0) {
  const nodes = [];
  while (text) {
    const found = depth < 6 ? SPAN.exec(text) : null;
    if (!found) {
      nodes.push(text);
      break;
    }
    if (found.index) nodes.push(text.slice(0, found.index));
    const [whole, , code, bold, star, under, label, target, bare] = found;
    if (code !== undefined) nodes.push(make("code", code));
    else if (bold !== undefined) nodes.push(make("strong", ...inline(bold, depth + 1)));
    else if (star !== undefined || under !== undefined) nodes.push(make("em", ...inline(star ?? under, depth + 1)));
    else nodes.push(link(target ?? bare, label || target || bare));
    text = text.slice(found.index + whole.length);
  }
  return nodes;
}

function link(target, label) {
  const anchor = make("a", label);
  anchor.href = target; // matched as http(s) above
  anchor.rel = "noopener noreferrer nofollow";
  anchor.target = "_blank";
  return anchor;
}

function codeBlock(lines, language) {
  const code = make("code", lines.join("\n"));
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.dataset.copy = "";
  const block = make("div", make("pre", code), copy);
  block.className = "block";
  if (language) code.dataset.language = language;
  return block;
}

const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;

function list(lines) {
  const ordered = ITEM.exec(lines[0])[3] !== undefined;
  const node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = Number(ITEM.exec(lines[0])[3]);
  const indent = ITEM.exec(lines[0])[1].length;
  let item = null;
  let inner = [];
  const close = () => {
    if (item && inner.length) item.append(...blocks(inner));
    inner = [];
  };
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent + 1) {
      close();
      item = make("li", ...inline(found[4]));
      node.append(item);
    } else inner.push(line.slice(Math.min(indent + 2, line.length - line.trimStart().length)));
  }
  close();
  return node;
}

function blocks(lines, depth = 0) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(line);
    if (fence) {
      const body = [];
      for (at += 1; at < lines.length && !lines[at].trimStart().startsWith(fence[1]); at += 1) body.push(lines[at]);
      at += 1;
      nodes.push(codeBlock(body, fence[2]));
    } else if (!line.trim()) {
      at += 1;
    } else if (/^#{1,6}\s/.test(line)) {
      const level = line.indexOf(" ");
      nodes.push(make(level === 1 ? "h2" : level === 2 ? "h3" : "h4", ...inline(line.slice(level + 1).trim())));
      at += 1;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      nodes.push(make("hr"));
      at += 1;
    } else if (/^>/.test(line) && depth < 4) {
      const body = [];
      for (; at < lines.length && /^>/.test(lines[at]); at += 1) body.push(lines[at].replace(/^> ?/, ""));
      nodes.push(make("blockquote", ...blocks(body, depth + 1)));
    } else if (ITEM.test(line) && depth < 6) {
      const body = [];
      for (; at < lines.length && (ITEM.test(lines[at]) || (/^\s{2,}\S/.test(lines[at]))); at += 1) body.push(lines[at]);
      nodes.push(list(body));
    } else {
      const body = [line];
      for (at += 1; at < lines.length && lines[at].trim() && !/^(\s*(`{3,}|~{3,})|#{1,6}\s|>)/.test(lines[at]) && !ITEM.test(lines[at]); at += 1) body.push(lines[at]);
      nodes.push(make("p", ...inline(body.join("\n"))));
    }
  }
  return nodes;
}

/** Replaces what is in `element` by `text`, rendered. */
export function render(element, text) {
  element.replaceChildren(...blocks(text.split("\n")));
}
