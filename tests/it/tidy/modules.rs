//! The modules of this crate and which of them names which, read from their source without what is only
//! for tests. A name that a module passes on by `use` counts as that of the module that defines it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// A path such as `engine::scheduler`; empty for `lib.rs`.
pub type ModulePath = String;

/// One file.
#[derive(Debug)]
pub struct Module {
    pub file: PathBuf,
    pub text: String,
    /// The words and signs of the code, `::` as one, without comments, strings, and what is only for tests.
    pub tokens: Vec<String>,
    /// What `use` brings in: the name, if it has one, the absolute path, and whether it is passed on by `pub`.
    imports: Vec<Import>,
    /// Modules that it declares for tests only.
    tests: Vec<String>,
}

#[derive(Debug, Clone)]
struct Import {
    name: Option<String>,
    path: Vec<String>,
    is_public: bool,
}

/// All modules but those for tests, and the program's `main.rs`.
#[derive(Debug)]
pub struct Modules {
    pub all: BTreeMap<ModulePath, Module>,
    /// For each module the others that it names.
    pub edges: BTreeMap<ModulePath, BTreeSet<ModulePath>>,
}

impl Modules {
    /// Reads `src`.
    pub fn read() -> Self {
        let mut files = Vec::new();
        walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
        let mut all: BTreeMap<_, _> = files
            .into_iter()
            .filter(|file| !file.ends_with("src/main.rs"))
            .map(|file| (path_of(&file), Module::new(file)))
            .collect();
        let tests: Vec<_> = all.iter().flat_map(|(path, m)| m.tests.iter().map(move |name| join(path, name))).collect();
        all.retain(|path, _| !tests.iter().any(|test| path == test || path.starts_with(&format!("{test}::"))));
        let names: BTreeSet<_> = all.keys().cloned().collect();
        for (path, module) in &mut all {
            module.imports = imports(&module.tokens, path, &names);
        }
        let mut modules = Self { all, edges: BTreeMap::new() };
        modules.edges = names.iter().map(|path| (path.clone(), modules.named(path))).collect();
        modules
    }

    /// The other modules that a module names.
    fn named(&self, path: &str) -> BTreeSet<ModulePath> {
        let module = &self.all[path];
        let words = without_uses(&module.tokens);
        // A name that is only passed on is not used here.
        let is_used = |import: &Import| {
            let name = import.name.as_ref().filter(|_| import.is_public);
            name.is_none_or(|name| words.contains(&name.as_str()))
        };
        let used = module.imports.iter().filter(|import| is_used(import)).map(|import| import.path.clone());
        let written = written_paths(&words).into_iter().filter_map(|p| absolute(&p, path, &self.all));
        let targets = used.chain(written).map(|target| self.defining(&target));
        targets.filter(|target| target != path && !target.is_empty()).collect()
    }

    /// The module that defines what an absolute path names.
    fn defining(&self, path: &[String]) -> ModulePath {
        let mut path = path.to_vec();
        // A name is passed on a few times at most.
        for _ in 0..8 {
            let mut module = String::new();
            let mut rest = path.as_slice();
            while let [first, others @ ..] = rest {
                let inner = join(&module, first);
                if !self.all.contains_key(&inner) {
                    break;
                }
                (module, rest) = (inner, others);
            }
            let Some(item) = rest.first() else { return module };
            let passed = self.all[&module].imports.iter().find(|import| import.name.as_ref() == Some(item));
            match passed {
                Some(import) if import.path != path => path = [&import.path, &rest[1..]].concat(),
                _ => return module,
            }
        }
        panic!("{path:?} is passed on in a circle");
    }

    /// Groups of modules each of which names all others of its group, perhaps through others.
    pub fn circles(&self) -> Vec<Vec<ModulePath>> {
        let reached: BTreeMap<&str, BTreeSet<&str>> =
            self.edges.keys().map(|p| (p.as_str(), self.reached(p))).collect();
        let mut circles = BTreeSet::new();
        for (path, from) in &reached {
            let circle: Vec<_> = from.iter().filter(|to| reached[**to].contains(path)).map(|s| s.to_string()).collect();
            if circle.len() > 1 {
                circles.insert(circle);
            }
        }
        circles.into_iter().collect()
    }

    fn reached<'a>(&'a self, from: &'a str) -> BTreeSet<&'a str> {
        let (mut reached, mut next) = (BTreeSet::new(), vec![from]);
        while let Some(path) = next.pop() {
            next.extend(self.edges[path].iter().map(String::as_str).filter(|to| reached.insert(*to)));
        }
        reached
    }
}

impl Module {
    fn new(file: PathBuf) -> Self {
        let text = fs::read_to_string(&file).unwrap();
        let (tokens, tests) = without_tests(&tokens(&text));
        Self { file, text, tokens, imports: Vec::new(), tests }
    }

    /// Whether its code has this word.
    pub fn has(&self, word: &str) -> bool {
        self.tokens.iter().any(|token| token == word)
    }
}

/// The first part of a module's path.
pub fn room(path: &str) -> &str {
    path.split("::").next().unwrap_or(path)
}

fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn path_of(file: &Path) -> ModulePath {
    let below = file.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap().with_extension("");
    let parts: Vec<_> = below.iter().map(|part| part.to_str().unwrap()).filter(|part| *part != "mod").collect();
    if parts == ["lib"] { String::new() } else { parts.join("::") }
}

fn join(module: &str, name: &str) -> ModulePath {
    if module.is_empty() { name.to_owned() } else { format!("{module}::{name}") }
}

/// The words and signs of a text.
pub fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut out, mut i) = (Vec::new(), 0);
    while i < chars.len() {
        match (at(i), at(i + 1)) {
            ('/', '/') => i += chars[i..].iter().take_while(|c| **c != '\n').count(),
            ('/', '*') => {
                i += 2;
                while i < chars.len() && (at(i), at(i + 1)) != ('*', '/') {
                    i += 1;
                }
                i += 2;
            }
            ('r', '"' | '#') if i == 0 || !is_word(at(i - 1)) || at(i - 1) == 'b' => {
                let hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
                i += 1 + hashes;
                if at(i) != '"' {
                    continue;
                }
                let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                i += 1;
                while i < chars.len() && !chars[i..].starts_with(&end) {
                    i += 1;
                }
                i += end.len();
            }
            ('"', _) => {
                i += 1;
                while i < chars.len() && at(i) != '"' {
                    i += if at(i) == '\\' { 2 } else { 1 };
                }
                i += 1;
            }
            ('\'', '\\') => i += 3 + chars[i + 3..].iter().take_while(|c| **c != '\'').count() + 1,
            ('\'', _) => i += if at(i + 2) == '\'' { 3 } else { 1 },
            (':', ':') => {
                out.push("::".to_owned());
                i += 2;
            }
            (c, _) if is_word(c) => {
                let word: String = chars[i..].iter().take_while(|c| is_word(**c)).collect();
                i += word.chars().count();
                out.push(word);
            }
            (c, _) => {
                if !c.is_whitespace() {
                    out.push(c.to_string());
                }
                i += 1;
            }
        }
    }
    out
}

/// Leaves out what is marked `#[cfg(test)]`; and the names of the modules among it.
fn without_tests(tokens: &[String]) -> (Vec<String>, Vec<String>) {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let (mut kept, mut tests, mut i) = (Vec::new(), Vec::new(), 0);
    while i < tokens.len() {
        if !tokens[i..].iter().take(MARK.len()).eq(MARK) {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        }
        i += MARK.len();
        let start = i;
        let mut depth = 0;
        while i < tokens.len() {
            match tokens[i].as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            let ends = depth == 0 && [";", "}"].contains(&tokens[i].as_str());
            i += 1;
            if ends {
                break;
            }
        }
        let item = &tokens[start..i];
        if let Some(at) = item.iter().position(|token| token == "mod").filter(|_| item.ends_with(&[";".to_owned()])) {
            tests.push(item[at + 1].clone());
        }
    }
    (kept, tests)
}

/// What the `use` items of a module bring in from this crate.
fn imports(tokens: &[String], module: &str, names: &BTreeSet<ModulePath>) -> Vec<Import> {
    let mut out = Vec::new();
    for (i, _) in tokens.iter().enumerate().filter(|(_, token)| *token == "use") {
        // `use<'_>` bounds a type.
        if tokens.get(i + 1).is_some_and(|next| next == "<") {
            continue;
        }
        let is_public = i > 0 && (tokens[i - 1] == "pub" || tokens[i - 1] == ")");
        let mut found = Vec::new();
        tree(&tokens[i + 1..], &mut 0, &[], &mut found);
        for (path, name) in found {
            if let Some(path) = absolute(&path, module, names) {
                out.push(Import { name: name.filter(|name| name != "_"), path, is_public });
            }
        }
    }
    out
}

/// One tree of a `use`, up to the sign that ends it.
fn tree(tokens: &[String], at: &mut usize, prefix: &[String], out: &mut Vec<(Vec<String>, Option<String>)>) {
    let mut path = prefix.to_vec();
    loop {
        match tokens[*at].as_str() {
            "{" => {
                *at += 1;
                while tokens[*at] != "}" {
                    tree(tokens, at, &path, out);
                    if tokens[*at] == "," {
                        *at += 1;
                    }
                }
                *at += 1;
                return;
            }
            "*" => {
                *at += 1;
                out.push((path, None));
                return;
            }
            "::" => *at += 1,
            "as" => {
                let name = tokens[*at + 1].clone();
                *at += 2;
                out.push((path, Some(name)));
                return;
            }
            ";" | "," | "}" => {
                let name = path.last().cloned();
                out.push((path, name));
                return;
            }
            // What a group is named after.
            "self" if !path.is_empty() => *at += 1,
            word => {
                path.push(word.to_owned());
                *at += 1;
            }
        }
    }
}

/// A path from the crate's root, or none if it leads out of the crate.
fn absolute(path: &[String], module: &str, names: &impl Has) -> Option<Vec<String>> {
    let mut base: Vec<String> = module.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
    let mut rest = path;
    match rest.first()?.as_str() {
        "crate" => base.clear(),
        "self" => {}
        "super" => {
            base.pop();
        }
        child if names.has(&join(module, child)) => return Some([base, path.to_vec()].concat()),
        _ => return None,
    }
    rest = &rest[1..];
    while rest.first().is_some_and(|part| part == "super") {
        base.pop();
        rest = &rest[1..];
    }
    Some([base, rest.to_vec()].concat())
}

/// A set of module paths.
trait Has {
    fn has(&self, path: &str) -> bool;
}

impl Has for BTreeSet<ModulePath> {
    fn has(&self, path: &str) -> bool {
        self.contains(path)
    }
}

impl Has for BTreeMap<ModulePath, Module> {
    fn has(&self, path: &str) -> bool {
        self.contains_key(path)
    }
}

/// The tokens outside of `use` items and declarations of modules.
fn without_uses(tokens: &[String]) -> Vec<&str> {
    let (mut out, mut i) = (Vec::new(), 0);
    while i < tokens.len() {
        let skipped = tokens[i] == "use" && tokens.get(i + 1).is_none_or(|next| next != "<");
        if skipped || (tokens[i] == "mod" && tokens.get(i + 2).is_some_and(|next| next == ";")) {
            i += tokens[i..].iter().take_while(|token| *token != ";").count();
        } else {
            out.push(tokens[i].as_str());
        }
        i += 1;
    }
    out
}

/// Every `a::b::c` in the code.
fn written_paths(words: &[&str]) -> Vec<Vec<String>> {
    let is_word = |word: &str| word.starts_with(|c: char| c.is_alphabetic() || c == '_');
    let mut out = Vec::new();
    for (i, word) in words.iter().enumerate() {
        let begins = is_word(word) && words.get(i + 1) == Some(&"::") && (i == 0 || words[i - 1] != "::");
        if begins {
            let mut path = vec![(*word).to_owned()];
            let mut at = i + 1;
            while words.get(at) == Some(&"::") && words.get(at + 1).is_some_and(|next| is_word(next)) {
                path.push(words[at + 1].to_owned());
                at += 2;
            }
            out.push(path);
        }
    }
    out
}

#[test]
fn plain_grouped_renamed_and_written_paths_are_all_read() {
    let names: BTreeSet<ModulePath> = ["a", "a::b", "a::b::c", "d", "d::e"].map(str::to_owned).into();
    let code = tokens(
        r#"use crate::{d::{self, e::{X as Y, Z}}}; // use crate::no;
        use super::W; pub(crate) use c::*; use std::fs; let x = crate::d::f("crate::no"); 'a': fn g<'a>() { c::h() }"#,
    );
    let found: Vec<_> = imports(&code, "a::b", &names)
        .into_iter()
        .map(|import| (import.path.join("::"), import.name.unwrap_or_default(), import.is_public))
        .collect();
    let expected = [("d", "d", false), ("d::e::X", "Y", false), ("d::e::Z", "Z", false), ("a::W", "W", false)];
    let expected: Vec<_> = expected.into_iter().chain([("a::b::c", "", true)]).collect();
    assert_eq!(found.iter().map(|(p, n, public)| (p.as_str(), n.as_str(), *public)).collect::<Vec<_>>(), expected);
    let written = written_paths(&without_uses(&code));
    assert_eq!(written, [vec!["crate", "d", "f"], vec!["c", "h"]]);
}

#[test]
fn what_is_only_for_tests_is_left_out() {
    let code =
        tokens("#[cfg(test)] mod inner; #[cfg(test)] pub fn f() { if x { y; } } fn kept() {} #[cfg(test)] mod t { z }");
    let (kept, tests) = without_tests(&code);
    assert_eq!((kept.join(" "), tests), ("fn kept ( ) { }".to_owned(), vec!["inner".to_owned()]));
}
